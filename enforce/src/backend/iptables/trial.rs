//! Whether the kernel takes rules such as ours: one is put into a chain that nothing jumps to, and goes at once.

use crate::backend::iptables::calls::{self, Programs};
use crate::backend::iptables::{Iptables, program_name};
use crate::command::CommandError;
use crate::plan::Family;
use crate::plan::rules::{Layout, PROBE};

/// How a rule is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    /// What cannot be read now is no refusal.
    pub(crate) patient: bool,
    /// Where the variant that the host uses refuses it, the other is tried: packets meet both.
    pub(crate) in_any_variant: bool,
}

impl Iptables {
    /// Tries a rule. The variant that took it is used from then on.
    ///
    /// # Errors
    /// Why the first refused it; of which [`CommandError::is_passing`] may end by itself.
    pub(crate) async fn probe(&mut self, rule: &str, how: Probe) -> Result<(), CommandError> {
        let family = Family::V4;
        let (views, unreadable) = self.look(family).await;
        if let Some(error) = unreadable {
            return if how.patient { Ok(()) } else { Err(error) };
        }
        let mut refusal = None;
        while let Some((variant, _)) = self.choose(family, &views) {
            let Some(&programs) = self.programs.get(&(family, variant)) else { break };
            match self.probe_variant(programs, rule).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_passing() => return Err(error),
                Err(error) => {
                    self.refusing.insert(variant);
                    refusal.get_or_insert(error);
                    if !how.in_any_variant {
                        break;
                    }
                }
            }
        }
        Err(refusal.unwrap_or(CommandError::NotInstalled { program: program_name(family) }))
    }

    async fn probe_variant(&self, programs: Programs, rule: &str) -> Result<(), CommandError> {
        let mut refused = None;
        // The first that takes it will do: where there is no raw table, there is another.
        for table in Layout::tables(&self.config) {
            let table = table.as_str();
            let made = format!("*{table}\n:{PROBE} - [0:0]\n-A {PROBE} {rule}\nCOMMIT\n");
            let input = format!("{made}*{table}\n-F {PROBE}\n-X {PROBE}\nCOMMIT\n");
            match calls::restore_input(programs, &input, rule).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_passing() => return Err(error),
                Err(error) => refused = Some(error),
            }
        }
        refused.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use nix::errno::Errno;
    use proto::time::Clock;

    use super::*;
    use crate::config::FirewallConfig;
    use crate::plan::rules::Variant;

    const STRICT: Probe = Probe { patient: false, in_any_variant: true };
    const PATIENT: Probe = Probe { patient: true, ..STRICT };
    const ABSENT: &str = "echo Could not fetch rule set generation id: Invalid argument >&2; exit 1";
    const REFUSES: &str = "echo RULE_APPEND failed >&2; exit 4";

    fn no_nf_tables() -> io::Result<()> {
        Err(Errno::EINVAL.into())
    }

    fn script(dir: &Path, name: &str, shell: &str) -> &'static str {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{shell}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        calls::forever(path.to_str().unwrap().to_owned())
    }

    /// With stand-ins: what nft's save and restore do, and legacy's restore.
    fn iptables(dir: &Path, [nft_save, nft, legacy]: [&str; 3]) -> Iptables {
        let mut iptables = Iptables::new(FirewallConfig::default(), false, Clock::system());
        let change = script(dir, "change", "exit 0");
        for family in Family::ALL {
            for (variant, save, restore) in [(Variant::Nft, nft_save, nft), (Variant::Legacy, "", legacy)] {
                let save = script(dir, &format!("{}-save", variant.as_str()), save);
                let restore = script(dir, &format!("{}-restore", variant.as_str()), restore);
                let locks = variant == Variant::Legacy;
                iptables.programs.insert((family, variant), Programs { change, save, restore, locks });
            }
        }
        iptables
    }

    async fn chosen(iptables: &mut Iptables) -> (Variant, &'static str) {
        let (views, unreadable) = iptables.look(Family::V6).await;
        assert!(unreadable.is_none(), "{unreadable:?}");
        iptables.choose(Family::V6, &views).unwrap()
    }

    #[tokio::test]
    async fn a_kernel_without_nf_tables_gets_legacy_rules_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut iptables = iptables(dir.path(), [ABSENT, REFUSES, ""]);
        iptables.ask = |_| no_nf_tables();
        iptables.probe("-j DROP", STRICT).await.unwrap();
        assert_eq!(chosen(&mut iptables).await, (Variant::Legacy, "nft is not available"));
        let removal = iptables.teardown(Family::V4).await;
        assert!(removal.left.is_empty(), "{:?}", removal.left);
    }

    #[tokio::test]
    async fn a_trial_without_nf_tables_is_a_trial_even_for_the_patient() {
        let dir = tempfile::tempdir().unwrap();
        let mut iptables = iptables(dir.path(), [ABSENT, "", "echo No chain/target/match by that name >&2; exit 1"]);
        iptables.ask = |_| no_nf_tables();
        for how in [STRICT, PATIENT] {
            let error = iptables.probe("-j DROP", how).await.unwrap_err();
            iptables.refusing.clear();
            assert!(error.to_string().contains("No chain/target/match"), "{error}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_read_although_the_kernel_has_it_is_not_taken_for_absent() {
        let dir = tempfile::tempdir().unwrap();
        let mut iptables = iptables(dir.path(), [ABSENT, "", ""]);
        for ask in [|_| Ok(()), |_| Err(Errno::EPERM.into())] {
            iptables.ask = ask;
            assert!(iptables.probe("-j DROP", STRICT).await.is_err());
            assert!(iptables.probe("-j DROP", PATIENT).await.is_ok());
            assert_eq!(iptables.teardown(Family::V4).await.left.len(), 1);
        }
    }

    #[tokio::test]
    async fn legacy_is_tried_where_nft_can_be_read_but_does_not_take_our_rules() {
        let dir = tempfile::tempdir().unwrap();
        let mut iptables = iptables(dir.path(), ["", REFUSES, ""]);
        iptables.probe("-j DROP", PATIENT).await.unwrap();
        assert_eq!(chosen(&mut iptables).await, (Variant::Legacy, "nft does not take our rules"));
        let mut only_nft = self::iptables(dir.path(), ["", REFUSES, ""]);
        let here = Probe { in_any_variant: false, ..STRICT };
        assert!(only_nft.probe("-j DROP", here).await.is_err(), "legacy was woken");
        let mut neither = self::iptables(dir.path(), ["", REFUSES, "echo no such table >&2; exit 3"]);
        let error = neither.probe("-j DROP", PATIENT).await.unwrap_err();
        assert!(error.to_string().contains("RULE_APPEND"), "the variant in use is the one to put right: {error}");
    }
}
