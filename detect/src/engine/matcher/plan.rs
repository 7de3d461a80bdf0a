//! The condition as it is evaluated: negations at the leaves, nested groups of one kind joined, status matchers merged
//! into one set a group, what is constant folded, and in each group the cheap parts first.
//!
//! Matchers have no effects and cannot fail, so neither the order nor the folding changes a result.

use proto::event::Event;

use super::leaf::Test;
use super::status::StatusSet;
use super::{Compare, Tree};

pub(super) enum Plan {
    Constant(bool),
    /// The downstream status is in the set.
    Status(StatusSet),
    Leaf {
        index: usize,
        negated: bool,
    },
    All(Vec<Plan>),
    Any(Vec<Plan>),
}

impl Plan {
    pub(super) fn new(tree: &Tree, leaves: &[Compare]) -> Self {
        Self::build(tree, leaves, false)
    }

    /// The plan of `tree`, or of its negation.
    fn build(tree: &Tree, leaves: &[Compare], negated: bool) -> Self {
        let (all, parts) = match tree {
            Tree::Not(part) => return Self::build(part, leaves, !negated),
            Tree::Leaf(index) => return Self::leaf(*index, &leaves[*index].test, negated),
            // De Morgan: the negation of a group is the other group of the negations.
            Tree::All(parts) => (!negated, parts),
            Tree::Any(parts) => (negated, parts),
        };
        let mut flat = Vec::with_capacity(parts.len());
        for part in parts {
            match Self::build(part, leaves, negated) {
                Self::All(inner) if all => flat.extend(inner),
                Self::Any(inner) if !all => flat.extend(inner),
                other => flat.push(other),
            }
        }
        flat = fold(all, flat);
        flat.sort_by_key(|part| part.cost(leaves));
        match (flat.len(), all) {
            (0, _) => Self::Constant(all),
            (1, _) => flat.swap_remove(0),
            (_, true) => Self::All(flat),
            (_, false) => Self::Any(flat),
        }
    }

    fn leaf(index: usize, test: &Test, negated: bool) -> Self {
        match test {
            Test::Status(set) => Self::Status(if negated { set.complement() } else { *set }),
            _ => Self::Leaf { index, negated },
        }
    }

    /// What evaluating all of it costs, see [`Test::cost`].
    fn cost(&self, leaves: &[Compare]) -> u32 {
        match self {
            Self::Constant(_) | Self::Status(_) => 0,
            Self::Leaf { index, .. } => leaves[*index].test.cost(),
            Self::All(parts) | Self::Any(parts) => parts.iter().map(|part| part.cost(leaves)).sum(),
        }
    }

    pub(super) fn is_true(&self, leaves: &[Compare], event: &Event<'_>, node: &str) -> bool {
        match self {
            Self::Constant(value) => *value,
            Self::Status(set) => set.contains(event.status),
            Self::Leaf { index, negated } => leaves[*index].test.is_true(event, node) != *negated,
            Self::All(parts) => parts.iter().all(|part| part.is_true(leaves, event, node)),
            Self::Any(parts) => parts.iter().any(|part| part.is_true(leaves, event, node)),
        }
    }

    /// A set that holds every status with which the condition can be true: what is not a status may be either.
    pub(super) fn statuses(&self) -> StatusSet {
        match self {
            Self::Constant(false) => StatusSet::NONE,
            Self::Constant(true) | Self::Leaf { .. } => StatusSet::ALL,
            Self::Status(set) => *set,
            Self::All(parts) => parts.iter().map(Self::statuses).fold(StatusSet::ALL, StatusSet::intersection),
            Self::Any(parts) => parts.iter().map(Self::statuses).fold(StatusSet::NONE, StatusSet::union),
        }
    }
}

/// Merges the statuses of a group and drops what cannot decide it; one constant that decides it replaces it all.
fn fold(all: bool, parts: Vec<Plan>) -> Vec<Plan> {
    let neutral = if all { StatusSet::ALL } else { StatusSet::NONE };
    let mut merged = neutral;
    let mut rest = Vec::with_capacity(parts.len());
    for part in parts {
        match part {
            Plan::Constant(value) if value == all => {}
            Plan::Constant(_) => return vec![part],
            Plan::Status(set) => merged = if all { merged.intersection(set) } else { merged.union(set) },
            other => rest.push(other),
        }
    }
    if merged == neutral.complement() {
        return vec![Plan::Constant(!all)];
    }
    if merged != neutral {
        rest.push(Plan::Status(merged));
    }
    rest
}
