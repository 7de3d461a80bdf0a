//! How a ban is said at Cloudflare: as entries that cover exactly the banned addresses, never one more.

use proto::net::Target;

/// A ban is split into at most 2 to the power of this many entries.
const SPLIT_BITS_MAX: u8 = 8;

/// What kind of entries a place holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cloudflare) enum Form {
    /// Access rules: addresses, IPv4 networks of 16 and 24 bits, IPv6 networks of 32, 48 and 64.
    Rules,
    /// Items of a list: IPv4 from 8 bits, IPv6 from 12.
    List,
}

impl Form {
    fn accepts(self, is_ipv4: bool, prefix: u8) -> bool {
        match (self, is_ipv4) {
            (Self::Rules, true) => matches!(prefix, 16 | 24 | 32),
            (Self::Rules, false) => matches!(prefix, 32 | 48 | 64 | 128),
            (Self::List, true) => prefix >= 8,
            (Self::List, false) => prefix >= 12,
        }
    }

    /// Length of the prefixes that a ban of `target` is split into; `None` where it would take too many entries.
    pub(in crate::cloudflare) fn piece_prefix(self, target: &Target) -> Option<u8> {
        let max = if target.is_ipv4() { 32 } else { 128 };
        let first = target.prefix();
        let last = first.saturating_add(SPLIT_BITS_MAX).min(max);
        (first..=last).find(|prefix| self.accepts(target.is_ipv4(), *prefix))
    }

    /// The entries that a ban of `target` takes; none where it cannot be said.
    pub(in crate::cloudflare) fn pieces(self, target: &Target) -> Vec<Target> {
        let subnets = self.piece_prefix(target).and_then(|prefix| target.net().subnets(prefix).ok());
        let nets = subnets.into_iter().flatten();
        nets.map(|net| Target::new(net.addr(), net.prefix_len())).collect()
    }

    /// The bans that `piece` could be a part of, widest first.
    pub(in crate::cloudflare) fn owners(self, piece: &Target) -> impl Iterator<Item = Target> + use<> {
        let piece = *piece;
        let widest = piece.prefix().saturating_sub(SPLIT_BITS_MAX);
        let around = (widest..=piece.prefix()).map(move |prefix| Target::new(piece.addr(), prefix));
        around.filter(move |owner| self.piece_prefix(owner) == Some(piece.prefix()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_accepted_stays_whole_and_the_rest_is_split_or_refused() {
        for (form, target, count, first) in [
            (Form::Rules, "192.0.2.1", 1, "192.0.2.1"),
            (Form::Rules, "192.0.2.0/24", 1, "192.0.2.0/24"),
            (Form::Rules, "192.0.2.128/25", 128, "192.0.2.128"),
            (Form::Rules, "198.51.96.0/20", 16, "198.51.96.0/24"),
            (Form::Rules, "10.0.0.0/15", 2, "10.0.0.0/16"),
            (Form::Rules, "2001:db8::1", 1, "2001:db8::1"),
            (Form::Rules, "2001:db8::/64", 1, "2001:db8::/64"),
            (Form::Rules, "2001:db8::/56", 256, "2001:db8::/64"),
            (Form::List, "10.0.0.0/9", 1, "10.0.0.0/9"),
            (Form::List, "2001:db8::/52", 1, "2001:db8::/52"),
            (Form::List, "2001:db8::1", 1, "2001:db8::1"),
        ] {
            let pieces = form.pieces(&target.parse().unwrap());
            assert_eq!((pieces.len(), pieces[0].to_string().as_str()), (count, first), "{target}");
        }
        for target in ["0.0.0.0/7", "2001:db8::/65", "2001:db8::/119"] {
            assert_eq!(Form::Rules.pieces(&target.parse().unwrap()), [], "{target}");
        }
    }

    proptest! {
        /// Exactly the banned addresses: pieces lie within, fill the whole, and know where they come from.
        #[test]
        fn pieces_cover_the_ban_and_nothing_else(bits: u128, prefix in 0u8..=128, v4: bool, list: bool) {
            let addr = if v4 { std::net::IpAddr::V4((bits as u32).into()) } else { std::net::IpAddr::V6(bits.into()) };
            let form = if list { Form::List } else { Form::Rules };
            let target = Target::new(addr, prefix);
            let pieces = form.pieces(&target);
            prop_assert!(pieces.iter().all(|piece| target.contains(piece)));
            if let Some(piece) = pieces.first() {
                prop_assert_eq!(pieces.len(), 1 << (piece.prefix() - target.prefix()));
                prop_assert!(form.owners(piece).any(|owner| owner == target));
            }
        }
    }
}
