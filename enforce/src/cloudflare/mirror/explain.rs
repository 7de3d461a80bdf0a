//! The answer to `explain`: whether an address has an entry at all places, and why or why not.

use std::net::IpAddr;

use proto::api::{BackendHold, HoldState};
use proto::net::Target;

use super::Mirror;
use super::book::Standing;
use super::wishes::Unwanted;

impl Mirror {
    /// Which entry holds the address at Cloudflare, as far as was seen, and why or why not.
    pub(in crate::cloudflare) fn explain(&self, address: IpAddr) -> BackendHold {
        let wishes = &self.terms.wishes;
        let desired = wishes.desired();
        if desired.is_paused() {
            return BackendHold::without(HoldState::Paused, "paused");
        }
        let host = Target::host(address);
        let banned = (0..=host.prefix()).rev().map(|prefix| Target::new(host.addr(), prefix));
        let banned: Vec<Target> = banned.filter(|target| desired.contains(target)).collect();
        let piece_of = |ban: &Target| wishes.piece_of(ban, host.addr());
        let wanted = banned.iter().filter(|ban| desired.wanted(ban).is_some());
        let found = wanted.clone().find_map(|ban| match piece_of(ban)? {
            (piece, None) => Some((ban, piece)),
            (_, Some(_)) => None,
        });
        match (found, banned.first()) {
            (Some((ban, piece)), _) => {
                let until = desired.wanted(ban).and_then(|entry| entry.ends);
                let hold = self.explain_wanted(piece);
                BackendHold { until: until.filter(|_| hold.entry.is_some()), ..hold }
            }
            (None, Some(ban)) => self.explain_unwanted(ban, address),
            (None, None) => self.explain_free(host),
        }
    }

    /// Of an entry that should be everywhere: what is worst.
    fn explain_wanted(&self, piece: Target) -> BackendHold {
        let standings = || self.books.iter().zip(&self.names).map(|(book, name)| (self.standing(book, piece), name));
        let (mut at, mut worst) = (Vec::new(), Standing::Held);
        for (standing, name) in standings() {
            if standing > worst {
                (worst, at) = (standing, Vec::new());
            }
            if standing == worst {
                at.push(name.as_str());
            }
        }
        let at = at.join(", ");
        let trouble = self.books.iter().find_map(|book| book.trouble.text());
        let trouble = trouble.map_or_else(String::new, |text| format!(": {text}"));
        let waiting: usize = self.books.iter().map(|book| book.waiting().0).sum();
        let (state, detail) = match worst {
            Standing::Held => (HoldState::Held, format!("has an entry at {at}, removed when the ban ends")),
            Standing::OtherMode => (HoldState::Waiting, format!("its entry at {at} has another mode{trouble}")),
            Standing::Absent => {
                (HoldState::Waiting, format!("about to be added at {at}, with {waiting} that wait{trouble}"))
            }
            Standing::Unknown => (HoldState::Waiting, format!("{at} is not seen as a whole yet{trouble}")),
            Standing::Taken => (HoldState::Refused, format!("{at} has an entry of {piece} that is not ours")),
            Standing::Refused => (HoldState::Refused, format!("Cloudflare takes no entry of {piece} at {at}")),
        };
        let entry = standings().all(|(standing, _)| standing <= Standing::OtherMode).then_some(piece);
        BackendHold { entry, ..BackendHold::without(state, detail) }
    }

    fn standing(&self, book: &super::Book, piece: Target) -> Standing {
        book.standing(&piece, self.terms.mode)
    }

    /// Of a ban that has no entry for the address.
    fn explain_unwanted(&self, ban: &Target, address: IpAddr) -> BackendHold {
        let wishes = &self.terms.wishes;
        if let Some(refusal) = wishes.desired().refusal(ban) {
            let hold = BackendHold::without(HoldState::Refused, format!("{ban} is not banned there: {refusal}"));
            return BackendHold { spared: true, ..hold };
        }
        match wishes.piece_of(ban, address) {
            None => BackendHold::without(HoldState::Refused, format!("Cloudflare has no entries of the size of {ban}")),
            Some((piece, Some(Unwanted::Holed))) => {
                let hold = BackendHold::without(HoldState::Refused, format!("{piece} has a guarded address in it"));
                BackendHold { spared: true, ..hold }
            }
            Some((_, Some(Unwanted::LeftOut) | None)) => {
                let max = self.terms.entries_max;
                BackendHold::without(
                    HoldState::LeftOut,
                    format!("{ban} does not fit: entries_max is {max}, and longer bans go first"),
                )
            }
        }
    }

    /// Of one that is not banned; an entry of before may still be there.
    fn explain_free(&self, host: Target) -> BackendHold {
        let around = (0..=host.prefix()).rev().map(|prefix| Target::new(host.addr(), prefix));
        let is_there =
            |target: &Target| self.books.iter().any(|book| self.standing(book, *target) <= Standing::OtherMode);
        match around.into_iter().find(is_there) {
            Some(entry) => {
                let hold = BackendHold::without(HoldState::Waiting, "not banned; its entry is about to be removed");
                BackendHold { entry: Some(entry), ..hold }
            }
            None => BackendHold::without(HoldState::NotDue, "not banned"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::time::Timestamp;

    use super::super::sim::{config, guard, record, update};
    use super::super::{Answer, Form, Mark, Mirror, Tempo};
    use super::*;
    use crate::cloudflare::call::{Ask, Seen};

    fn mirror(form: Form, entries_max: u32) -> Mirror {
        let guard = guard(&["198.51.100.7/32"]);
        Mirror::new(&config(form, entries_max), Mark::new("me"), guard, Tempo::default(), 1)
    }

    /// Carries out everything that is wanted, at places that hold `foreign` and refuse nothing.
    fn settle(mirror: &mut Mirror, foreign: &[&str], now: Timestamp) {
        let mut made = 0;
        for _ in 0..1000 {
            let Some(call) = mirror.next(now) else { return };
            let answer = match &call.ask {
                Ask::Look(_) => {
                    let seen = foreign.iter().enumerate().map(|(n, target)| Seen {
                        id: format!("foreign-{n}"),
                        target: Some(target.parse().unwrap()),
                        mode: None,
                        note: "by hand".to_owned(),
                        is_elsewhere: false,
                    });
                    Answer::Page { entries: seen.collect(), next: None, total: Some(foreign.len()) }
                }
                Ask::Create(..) => {
                    made += 1;
                    Answer::Made(format!("ours-{made}"))
                }
                Ask::Delete(..) | Ask::SetMode(..) => Answer::Done,
                other => panic!("{other:?}"),
            };
            mirror.handle(call, Ok(answer), now);
        }
    }

    #[test]
    fn an_address_is_held_waits_or_is_left_out_for_a_reason_that_is_told() {
        let now = Timestamp::from_secs(100);
        let mut mirror = mirror(Form::Rules, 4);
        let ask = |mirror: &Mirror, address: &str| mirror.explain(address.parse().unwrap());
        assert_eq!(ask(&mirror, "192.0.2.1").state, HoldState::NotDue);
        let bans = [
            record("192.0.2.1", Some(900), 1),
            record("192.0.2.2", Some(800), 1),
            record("192.0.2.3", Some(700), 1),
            record("198.51.100.0/24", Some(999), 1),
            record("2001:db8::/65", Some(999), 1),
            record("203.0.113.0/24", Some(998), 1),
            record("203.0.113.9", Some(500), 1),
            record("198.51.100.7", Some(999), 1),
            record("192.0.2.4", Some(600), 1),
        ];
        mirror.handle_update(&update(1, true, &bans), now);
        let waits = ask(&mirror, "192.0.2.1");
        assert_eq!((waits.state, waits.entry), (HoldState::Waiting, None));
        assert!(waits.detail.contains("not seen as a whole"), "{}", waits.detail);
        settle(&mut mirror, &["192.0.2.3"], now);

        let held = ask(&mirror, "192.0.2.1");
        assert_eq!((held.state, held.until), (HoldState::Held, Some(Timestamp::from_secs(900))), "{}", held.detail);
        assert_eq!(held.entry.unwrap().to_string(), "192.0.2.1");
        let wide = ask(&mirror, "203.0.113.9");
        assert_eq!(wide.entry.unwrap().to_string(), "203.0.113.0/24", "a wider ban holds whom a narrow one would not");
        for (address, state, spared, said) in [
            ("192.0.2.3", HoldState::Refused, false, "not ours"),
            ("198.51.100.7", HoldState::Refused, true, "in never_ban"),
            ("198.51.100.8", HoldState::Refused, true, "has a guarded address in it"),
            ("2001:db8::1", HoldState::Refused, false, "no entries of the size of 2001:db8::/65"),
            ("192.0.2.4", HoldState::LeftOut, false, "entries_max is 4"),
            ("192.0.2.9", HoldState::NotDue, false, "not banned"),
        ] {
            let hold = ask(&mirror, address);
            assert_eq!((hold.state, hold.spared, hold.entry), (state, spared, None), "{address}: {}", hold.detail);
            assert!(hold.detail.contains(said), "{address}: {}", hold.detail);
        }
        mirror.handle_pause(true, now);
        let paused = ask(&mirror, "192.0.2.1");
        assert_eq!((paused.state, paused.spared), (HoldState::Paused, true));
    }

    #[test]
    fn an_entry_that_outlives_its_ban_is_about_to_go() {
        let now = Timestamp::from_secs(100);
        let mut mirror = mirror(Form::Rules, 10);
        mirror.handle_update(&update(1, true, &[record("192.0.2.1", Some(200), 1)]), now);
        settle(&mut mirror, &[], now);
        mirror.handle_time(Timestamp::from_secs(200));
        let hold = mirror.explain("192.0.2.1".parse().unwrap());
        assert_eq!((hold.state, hold.entry.is_some(), hold.is_held()), (HoldState::Waiting, true, false));
    }
}
