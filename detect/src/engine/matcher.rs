//! The condition of a rule: Traefik's rule syntax, parsed once into a plan that is cheap for each event.
//!
//! Matchers take back-ticked or double-quoted arguments and mean any of them; `&&`, `||`, `!` and parentheses combine
//! them. What a condition looks at is the log line, and an absent value is `-` (a missing query parameter has no value
//! at all). Regular expressions are unanchored and run in linear time.
//!
//! | matcher | is true when |
//! |---|---|
//! | `Status` `OriginStatus` | the client's status, or the service's, is `404`, in `500-599`, or absent (`-`) |
//! | `Host` | the host is this one, in any case and with or without a final dot |
//! | `HostRegexp` | the host matches, in any case |
//! | `Path` `PathPrefix` `PathRegexp` | the path as logged, without the query, is, begins with, or matches this |
//! | `Method` | the method is this one; the argument is put in upper case first, the logged method is not |
//! | `Header` `HeaderRegexp` | the header named first has or matches one of the other arguments |
//! | `Query` `QueryRegexp` | the parameter named first has or matches one of the others; alone: its value is empty |
//! | `ClientIP` | the client is one of these addresses, CIDRs or named sets (`cloudflare`, `private`) |
//! | `UserAgent` `UserAgentRegexp` | the user agent is or matches this |
//! | `Router` | the router is this one, or the chain `a@file -> b@file` is or has this element |
//! | `Service` `EntryPoint` `Username` `Node` `Protocol` | the value is this one |
//!
//! Different from Traefik, because a log line is not a request: `ClientIP` is the client that ingest found and not the
//! peer (false without one), paths are not decoded, several values of one header are one text joined with `,`, and
//! `\w`, `\d` and `\s` know Unicode. Wildcards in `Host` are refused: `HostRegexp` says which labels they stand for.
//!
//! Nothing here logs, waits or reads a clock, and matching allocates nothing, query parameters with `%` or `+` aside.

mod error;
mod leaf;
mod plan;
mod query;
mod status;
mod syntax;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use proto::event::Event;

use self::error::Fault;
pub use self::error::SyntaxError;
use self::leaf::Test;
use self::plan::Plan;
use self::status::StatusSet;
use self::syntax::Expr;

/// Longest condition in bytes: some thousand listed names, and a bound on what a mistake can cost at start.
pub const EXPRESSION_BYTES_MAX: usize = 64 * 1024;

/// Deepest nesting of parentheses: far more than people write, far less than a stack holds.
pub const NESTING_MAX: usize = 64;

/// Most memory in bytes that one matcher's regular expressions may compile to: enough for a list of bots that fills a
/// condition, too little for repetitions of repetitions to fill a host.
pub const REGEX_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A parsed condition. Cheap to clone.
#[derive(Clone)]
pub struct Matcher(Arc<Compiled>);

struct Compiled {
    source: String,
    /// In the order of the source.
    leaves: Vec<Compare>,
    /// The condition as written, for explanations.
    tree: Tree,
    /// The same condition as it is evaluated.
    plan: Plan,
    /// Statuses outside which the condition is false.
    statuses: StatusSet,
}

/// One matcher of the condition.
struct Compare {
    /// As written.
    text: String,
    test: Test,
}

/// The shape of the condition; leaves by index.
enum Tree {
    Leaf(usize),
    Not(Box<Tree>),
    All(Vec<Tree>),
    Any(Vec<Tree>),
}

/// A matcher that decided about an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// For people: ``Status(`404`) is false``.
    pub text: String,
    /// Whether the matcher itself, without any `!` before it, is true.
    pub result: bool,
}

impl Matcher {
    /// Parses and compiles a condition.
    ///
    /// # Errors
    /// The first mistake, with its position: syntax, then unknown matchers, arguments and limits from left to right.
    pub fn parse(text: &str) -> Result<Self, SyntaxError> {
        Self::compile(text).map_err(|fault| SyntaxError::new(text, &fault))
    }

    fn compile(text: &str) -> Result<Self, Fault<'_>> {
        let mut leaves = Vec::new();
        let tree = Tree::new(syntax::parse(text)?, &mut leaves)?;
        let plan = Plan::new(&tree, &leaves);
        let statuses = plan.statuses();
        Ok(Self(Arc::new(Compiled { source: text.to_owned(), leaves, tree, plan, statuses })))
    }

    /// Whether the condition is true for `event`, read by `node`.
    pub fn matches(&self, event: &Event<'_>, node: &str) -> bool {
        self.may_match_status(event.status) && self.0.plan.is_true(&self.0.leaves, event, node)
    }

    /// False only when no event with this downstream status (0 = absent) can match: one bit, before anything else.
    pub fn may_match_status(&self, status: u16) -> bool {
        self.0.statuses.contains(status)
    }

    /// Request headers that the condition looks at: lower case, sorted, each once. The user agent of `UserAgent` is not
    /// among them, as an event has it as a field.
    pub fn interest_headers(&self) -> Vec<String> {
        let names: BTreeSet<&str> = self.0.leaves.iter().filter_map(|leaf| leaf.test.header()).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// The condition as it was given.
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// The matchers that decided, in the order of the source: of a conjunction that is false its first false part, of
    /// one that is true all parts; of a disjunction the other way round.
    pub fn explain(&self, event: &Event<'_>, node: &str) -> Vec<Leaf> {
        self.0.tree.explain(&|index| self.0.leaves[index].explain(event, node)).1
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Matcher").field(&self.0.source).finish()
    }
}

impl Compare {
    fn explain(&self, event: &Event<'_>, node: &str) -> Leaf {
        let result = self.test.is_true(event, node);
        Leaf { text: format!("{} is {result}", self.text), result }
    }
}

impl Tree {
    fn new<'a>(expr: Expr<'a>, leaves: &mut Vec<Compare>) -> Result<Self, Fault<'a>> {
        let mut list =
            |parts: Vec<Expr<'a>>| parts.into_iter().map(|part| Self::new(part, leaves)).collect::<Result<Vec<_>, _>>();
        Ok(match expr {
            Expr::All(parts) => Self::All(list(parts)?),
            Expr::Any(parts) => Self::Any(list(parts)?),
            Expr::Not(part) => Self::Not(Box::new(Self::new(*part, leaves)?)),
            Expr::Call(call) => {
                leaves.push(Compare { text: call.text.to_owned(), test: Test::new(&call)? });
                Self::Leaf(leaves.len() - 1)
            }
        })
    }

    fn explain(&self, leaf: &impl Fn(usize) -> Leaf) -> (bool, Vec<Leaf>) {
        match self {
            Self::Leaf(index) => {
                let leaf = leaf(*index);
                (leaf.result, vec![leaf])
            }
            Self::Not(part) => {
                let (result, leaves) = part.explain(leaf);
                (!result, leaves)
            }
            Self::All(parts) => explain_until(false, parts, leaf),
            Self::Any(parts) => explain_until(true, parts, leaf),
        }
    }
}

/// The first part whose result is `deciding`, or else all parts together.
fn explain_until(deciding: bool, parts: &[Tree], leaf: &impl Fn(usize) -> Leaf) -> (bool, Vec<Leaf>) {
    let mut all = Vec::new();
    for part in parts {
        let (result, mut leaves) = part.explain(leaf);
        if result == deciding {
            return (deciding, leaves);
        }
        all.append(&mut leaves);
    }
    (!deciding, all)
}
