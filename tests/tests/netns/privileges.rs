//! The service as the unit and the container run it: a user of its own with two capabilities, which may open the lock of
//! iptables and write its state, and nothing else.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};

use tests::portcullis::{Service, binary, wait_for};

use super::{Variant, World, only_ban};

/// A user and group that nobody has.
const USER: u32 = 61_001;

/// What systemd and tmpfiles.d do, in a `/run` of its own: the lock's group is ours; whether legacy tables are in use, the
/// kernel tells the group root only.
const LAUNCH: &str = r#"mount -t tmpfs tmpfs /run && install -m 640 -g "$0" /dev/null /run/xtables.lock &&
    exec setpriv --reuid "$0" --regid "$0" --groups 0 --no-new-privs --bounding-set -all,+net_admin,+net_raw \
    --inh-caps -all,+net_admin,+net_raw --ambient-caps -all,+net_admin,+net_raw "$@""#;

fn bans_as_its_own_user(variant: Variant) {
    let world = World::new(variant, "");
    let folder = world.folder.path();
    fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    // Where the socket comes to be.
    chown(folder, Some(USER), None).unwrap();
    chown(folder.join("state"), Some(USER), None).unwrap();
    let own = folder.join("portcullis");
    fs::copy(binary().unwrap(), &own).unwrap();
    let (user, own) = (USER.to_string(), own.display().to_string());
    let start = || {
        let launch = ["sh", "-c", LAUNCH, &user, &own];
        Service::start_as(folder, world.server.name(), &launch).unwrap()
    };

    let service = start();
    for v4 in [true, false] {
        world.attack_times(v4, 15);
        world.wait_cut_off(v4);
        assert_eq!(only_ban(&service, v4)["evidence"]["failures"], 15);
        service.verb(&["unban", "--all"]).unwrap().expect(0).unwrap();
        world.wait_free(v4);
    }
    world.visitor_is_served();
    service.verb(&["status"]).unwrap().expect(0).unwrap();
    service.stop().unwrap();
    let rules = world.server.run(&format!("{}-save", variant.command(true)), &["-t", "raw"]).unwrap();
    assert!(rules.contains("-j PORTCULLIS"), "{rules}");
    // What it left is its own, and can be taken over.
    let service = start();
    let in_order = || service.verb(&["status"]).is_ok_and(|answer| answer.code == 0);
    wait_for("status finds nothing wrong", || in_order().then_some(())).unwrap();
    service.stop().unwrap();
}

#[test]
fn it_bans_as_its_own_user_on_an_nft_host() {
    bans_as_its_own_user(Variant::Nft);
}

#[test]
fn it_bans_as_its_own_user_on_a_legacy_host() {
    bans_as_its_own_user(Variant::Legacy);
}
