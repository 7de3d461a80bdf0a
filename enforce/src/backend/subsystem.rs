//! Which subsystems of netfilter the kernel has. It is asked over netlink, as what programs say of it differs by version.

use std::io;

use crate::backend::nftables;
use crate::command::CommandError;

/// A part of the kernel that programs speak to over netlink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subsystem {
    /// Kernel sets of ipset.
    Ipset,
    /// What nftables and the nft variant of iptables are made of.
    NfTables,
}

/// How a subsystem is asked whether it is there. It may block.
pub(crate) type Ask = fn(Subsystem) -> io::Result<()>;

/// Asks the kernel, which loads the subsystem's module where it can.
pub(crate) const ASK_KERNEL: Ask = nftables::greet;

/// Whether the kernel lacks the subsystem. What is not known is no absence.
pub(crate) async fn is_absent(subsystem: Subsystem, ask: Ask) -> bool {
    let asked = tokio::task::spawn_blocking(move || ask(subsystem)).await;
    let failed = |source| CommandError::Kernel { what: "look for a subsystem", source };
    asked.is_ok_and(|answer| answer.map_err(failed).is_err_and(|error| error.is_absence()))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[tokio::test]
    async fn only_a_kernel_that_knows_no_such_subsystem_lacks_it() {
        assert!(is_absent(Subsystem::NfTables, |_| Err(Errno::EINVAL.into())).await);
        assert!(is_absent(Subsystem::Ipset, |_| Err(Errno::EPROTONOSUPPORT.into())).await);
        assert!(!is_absent(Subsystem::NfTables, |_| Err(Errno::EPERM.into())).await);
        // ipset's own errors begin at 4096.
        assert!(!is_absent(Subsystem::Ipset, |_| Err(io::Error::from_raw_os_error(4097))).await);
        assert!(!is_absent(Subsystem::Ipset, |_| Ok(())).await);
    }
}
