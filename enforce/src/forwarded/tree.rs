//! Patterns as a tree of chains: a packet is searched for what many patterns begin with before it is searched for each of
//! them, so that its cost grows with the logarithm of their number. Pure.

use std::collections::BTreeMap;

/// Fewer patterns that begin alike are searched for one by one.
const BRANCH_MIN: usize = 4;
/// Chains below one another. nf_tables follows at most 16 jumps, of which others take some.
const DEPTH_MAX: usize = 7;

/// What is done with a packet that has a pattern in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found<T> {
    /// What was asked for with the pattern.
    Leaf(T),
    /// It is searched on, by the chain of this number.
    Branch(usize),
}

/// Chains by number; each a list of searches. Those that lead nowhere go on with the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tree<T>(pub(crate) Vec<Vec<(String, Found<T>)>>);

impl<T: Clone> Tree<T> {
    /// Chain 0 is where it begins, even of no patterns.
    pub(crate) fn new() -> Self {
        Self(vec![Vec::new()])
    }

    /// Searches for `patterns` from chain 0, after what is there. All begin with the same `shared` bytes, for which alone
    /// no packet is searched, as most have them.
    pub(crate) fn grow(&mut self, patterns: BTreeMap<String, T>, shared: usize) {
        self.fill(0, &Vec::from_iter(patterns), (shared, 0));
    }

    /// Searches for `patterns` in packets with `gate` in them alone.
    pub(crate) fn grow_behind(&mut self, gate: &str, patterns: BTreeMap<String, T>) {
        if !patterns.is_empty() {
            let chain = self.branch(0, gate.to_owned());
            self.fill(chain, &Vec::from_iter(patterns), (0, 1));
        }
    }

    fn branch(&mut self, from: usize, pattern: String) -> usize {
        let chain = self.0.len();
        self.0.push(Vec::new());
        self.0[from].push((pattern, Found::Branch(chain)));
        chain
    }

    /// `patterns`, in order, share their first `shared` bytes.
    fn fill(&mut self, chain: usize, patterns: &[(String, T)], (shared, depth): (usize, usize)) {
        let alike = |a: &(String, T), b: &(String, T)| a.0.as_bytes().get(shared) == b.0.as_bytes().get(shared);
        for group in patterns.chunk_by(alike) {
            let (Some((first, _)), Some((last, _))) = (group.first(), group.last()) else { continue };
            if group.len() < BRANCH_MIN || depth == DEPTH_MAX {
                let leaves = group.iter().map(|(pattern, leaf)| (pattern.clone(), Found::Leaf(leaf.clone())));
                self.0[chain].extend(leaves);
                continue;
            }
            let shared = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
            let below = self.branch(chain, first[..shared].to_owned());
            self.fill(below, group, (shared, depth + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a packet with this text in it comes to, and how deep.
    fn search(tree: &Tree<usize>, chain: usize, text: &str, depth: usize) -> (Vec<usize>, usize) {
        let (mut found, mut deepest) = (Vec::new(), depth);
        for (pattern, then) in tree.0[chain].iter().filter(|(pattern, _)| text.contains(pattern)) {
            match then {
                Found::Leaf(leaf) => found.push(*leaf),
                Found::Branch(below) => {
                    assert!(text.contains(pattern));
                    let (more, reached) = search(tree, *below, text, depth + 1);
                    found.extend(more);
                    deepest = deepest.max(reached);
                }
            }
        }
        (found, deepest)
    }

    proptest! {
        #[test]
        fn a_tree_finds_what_a_list_finds(
            patterns in prop::collection::btree_set("[ab][ab.]{0,9},", 0..60), texts in prop::collection::vec("[ab.,]{0,30}", 8),
        ) {
            let patterns: Vec<(String, usize)> = patterns.into_iter().zip(0..).collect();
            let mut tree = Tree::new();
            tree.grow(patterns.iter().cloned().collect(), 0);
            tree.grow_behind("b", patterns.iter().map(|(pattern, n)| (pattern.clone(), n + 1000)).collect());
            for text in texts {
                let (mut found, depth) = search(&tree, 0, &text, 0);
                found.sort_unstable();
                let there = |(pattern, n): &(String, usize)| text.contains(pattern).then_some(*n);
                let plain: Vec<usize> = patterns.iter().filter_map(there).collect();
                let gated = plain.iter().filter(|_| text.contains('b')).map(|n| n + 1000);
                prop_assert_eq!(found, plain.iter().copied().chain(gated).collect::<Vec<_>>());
                prop_assert!(depth <= DEPTH_MAX);
            }
        }
    }

    #[test]
    fn a_thousand_addresses_cost_a_few_dozen_searches() {
        let addresses = (0..1000u32).map(|n| std::net::Ipv4Addr::from(n.wrapping_mul(2_654_435_761)));
        let mut tree = Tree::new();
        tree.grow(addresses.map(|addr| (format!("\r\nX-Forwarded-For: {addr},"), 0)).collect(), 2);
        let mut reached = vec![0];
        let mut searches = 0;
        let text = "\r\nX-Forwarded-For: 198.51.100.7, ";
        while let Some(chain) = reached.pop() {
            searches += tree.0[chain].len();
            let below = tree.0[chain].iter().filter(|(pattern, _)| text.contains(pattern));
            reached.extend(below.filter_map(|(_, then)| if let Found::Branch(n) = then { Some(*n) } else { None }));
        }
        assert!(searches < 50, "{searches} searches");
        assert!(tree.0.len() < 500, "{} chains", tree.0.len());
    }
}
