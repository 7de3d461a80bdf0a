//! Whether the firewall sees packets between containers of one bridge at all.

use std::fs;
use std::path::Path;

use crate::plan::Family;

/// Bridges whose packets pass the family's rules unseen, by name: those with two ports at least.
pub(crate) fn unseen_bridges(family: Family) -> Vec<String> {
    unseen_in(Path::new("/sys/class/net"), Path::new("/proc/sys/net/bridge"), family)
}

/// What an operator can do about it.
pub(crate) fn remedy(family: Family) -> String {
    let (global, _) = switches(family);
    format!("modprobe br_netfilter; sysctl -w net.bridge.{global}=1")
}

/// The switch of all bridges, and that of one.
fn switches(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("bridge-nf-call-iptables", "nf_call_iptables"),
        Family::V6 => ("bridge-nf-call-ip6tables", "nf_call_ip6tables"),
    }
}

fn unseen_in(interfaces: &Path, switches_of_all: &Path, family: Family) -> Vec<String> {
    let (global, own) = switches(family);
    let is_on = |path: &Path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "1");
    // Without the module there is no such folder, and then a bridge's own switch does nothing.
    let has_module = switches_of_all.is_dir();
    if has_module && is_on(&switches_of_all.join(global)) {
        return Vec::new();
    }
    let mut unseen: Vec<String> = fs::read_dir(interfaces)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| fs::read_dir(entry.path().join("brif")).is_ok_and(|ports| ports.count() >= 2))
        .filter(|entry| !(has_module && is_on(&entry.path().join("bridge").join(own))))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    unseen.sort();
    unseen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_is_seen_by_its_own_switch_or_that_of_all() {
        let dir = tempfile::tempdir().unwrap();
        let (net, all) = (dir.path().join("net"), dir.path().join("switches"));
        for (bridge, ports) in [("br-a", 2), ("br-b", 2), ("docker0", 1)] {
            fs::create_dir_all(net.join(bridge).join("bridge")).unwrap();
            (0..ports).for_each(|n| fs::create_dir_all(net.join(format!("{bridge}/brif/veth{n}"))).unwrap());
        }
        fs::create_dir_all(net.join("eth0")).unwrap();
        fs::write(net.join("br-b/bridge/nf_call_iptables"), "1\n").unwrap();
        assert_eq!(unseen_in(&net, &all, Family::V4), ["br-a", "br-b"], "without the module");
        fs::create_dir_all(&all).unwrap();
        fs::write(all.join("bridge-nf-call-iptables"), "0\n").unwrap();
        assert_eq!(unseen_in(&net, &all, Family::V4), ["br-a"]);
        assert_eq!(unseen_in(&net, &all, Family::V6), ["br-a", "br-b"]);
        fs::write(all.join("bridge-nf-call-iptables"), "1\n").unwrap();
        assert_eq!(unseen_in(&net, &all, Family::V4), [""; 0]);
    }
}
