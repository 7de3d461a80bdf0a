//! Do most visitors hide behind one address that may not be banned? Then bans cannot help, and the operator must know.
//!
//! A majority vote (Boyer and Moore) over blocks of lines names a candidate, the next block counts it.

use std::net::IpAddr;

/// Lines in a block.
const BLOCK_LINES: u32 = 200;
/// Share of a block, in per cent, from which one address is suspicious.
const SHARE_MIN: u32 = 60;

/// Watches the clients of all lines.
#[derive(Debug, Default)]
pub struct Visitors {
    vote: Option<IpAddr>,
    balance: u32,
    candidate: Option<IpAddr>,
    hits: u32,
    lines: u32,
    found: Option<(IpAddr, u8)>,
}

impl Visitors {
    /// Notes the client of one line; at the end of a block, says whether the finding is new.
    pub fn note(&mut self, client: IpAddr, may_be_banned: impl Fn(IpAddr) -> bool) -> bool {
        match self.vote {
            Some(vote) if vote == client => self.balance += 1,
            Some(_) if self.balance > 0 => self.balance -= 1,
            _ => (self.vote, self.balance) = (Some(client), 1),
        }
        self.hits += u32::from(self.candidate == Some(client));
        self.lines += 1;
        self.lines >= BLOCK_LINES && self.end_block(may_be_banned)
    }

    /// The address, and its share of the newest block in per cent.
    pub fn hidden_behind(&self) -> Option<(IpAddr, u8)> {
        self.found
    }

    fn end_block(&mut self, may_be_banned: impl Fn(IpAddr) -> bool) -> bool {
        let share = self.hits * 100 / self.lines;
        let former = self.found.map(|(addr, _)| addr);
        let suspicious = share >= SHARE_MIN;
        self.found = self.candidate.filter(|&addr| suspicious && !may_be_banned(addr)).map(|addr| (addr, share as u8));
        self.candidate = self.vote;
        (self.vote, self.balance, self.hits, self.lines) = (None, 0, 0, 0);
        self.found.is_some_and(|(addr, _)| Some(addr) != former)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_with_most_lines_is_found_and_forgotten() {
        let mut visitors = Visitors::default();
        let addr = |n: u32| IpAddr::V4((0x0a00_0000 + n).into());
        let hidden = |n: u32| if n.is_multiple_of(4) { addr(n) } else { addr(1) };
        let news = (0..3 * BLOCK_LINES).filter(|&n| visitors.note(hidden(n), |_| false)).count();
        assert_eq!(news, 1, "told once");
        assert_eq!(visitors.hidden_behind(), Some((addr(1), 75)));
        (0..2 * BLOCK_LINES).for_each(|n| assert!(!visitors.note(addr(n), |_| false)));
        assert_eq!(visitors.hidden_behind(), None);
    }

    #[test]
    fn an_address_that_may_be_banned_is_no_hiding_place() {
        let mut visitors = Visitors::default();
        (0..3 * BLOCK_LINES).for_each(|_| assert!(!visitors.note([192, 0, 2, 1].into(), |_| true)));
    }
}
