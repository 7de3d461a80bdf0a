//! Whether any custom rule uses our list. A list that no rule names blocks nobody.
//!
//! Rules may be seen with the right to read the zones' firewall; a token without it cannot tell.

use super::call::CallError;
use super::client::Client;
use super::wire;

/// Zones that are looked at; with more it cannot be told.
const ZONES_MAX: usize = 200;
const ZONES_PAGE: usize = 50;
/// Where custom rules stand.
const PHASE: &str = "rulesets/phases/http_request_firewall_custom/entrypoint";

/// What is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Usage {
    /// A rule uses it.
    Used,
    /// No rule does.
    Unused,
    /// Not all rules were seen.
    Unseen(Unseen),
}

/// Why not all rules were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unseen {
    /// Those of the account, which an Enterprise account has.
    Account,
    /// Those that the account's rules execute.
    Executed,
    /// Those of all zones, or of some.
    Zones,
    /// There are more than [`ZONES_MAX`].
    TooMany,
}

impl Unseen {
    /// The reason, for people.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Account => "the token may not read the custom rules of the account (Account: Account WAF, Read)",
            Self::Executed => "the account's rules execute others, which are not looked at",
            Self::Zones => "the token may not read all zones' firewall (Zone: Zone, Read and Zone WAF, Read)",
            Self::TooMany => "the account has too many zones to look at",
        }
    }
}

/// Looks: at what the list says of itself, then at the account's and all its zones' custom rules.
///
/// # Errors
/// When Cloudflare does not answer.
pub(super) async fn look(client: &Client, account: &str, list_id: &str, name: &str) -> Result<Usage, CallError> {
    let path = format!("/accounts/{account}/rules/lists/{list_id}");
    let (list, _) = client.read::<wire::List>(path, &[]).await?;
    if list.num_referencing_filters.is_some_and(|filters| filters > 0.0) {
        return Ok(Usage::Used);
    }
    let of_account = match rules(client, format!("/accounts/{account}/{PHASE}")).await? {
        None => Some(Unseen::Account),
        Some(rules) if rules.iter().any(|rule| rule.uses(name)) => return Ok(Usage::Used),
        // What it executes stands elsewhere.
        Some(rules) => rules.iter().any(|rule| rule.action == "execute").then_some(Unseen::Executed),
    };
    let Some(zones) = zones(client, account).await? else { return Ok(Usage::Unseen(Unseen::Zones)) };
    let mut of_zones = if zones.is_empty() { Some(Unseen::Zones) } else { None };
    for zone in zones.iter().take(ZONES_MAX) {
        match rules(client, format!("/zones/{}/{PHASE}", zone.id)).await? {
            None => of_zones = Some(Unseen::Zones),
            Some(rules) if rules.iter().any(|rule| rule.uses(name)) => return Ok(Usage::Used),
            Some(_) => {}
        }
    }
    let of_zones = of_zones.or((zones.len() > ZONES_MAX).then_some(Unseen::TooMany));
    // Other accounts have no rules of their own, and say so to nobody who may not read them.
    let may_have_rules =
        |unseen: &Unseen| *unseen != Unseen::Account || zones.iter().any(wire::Zone::may_be_enterprise);
    Ok(of_zones.or(of_account.filter(may_have_rules)).map_or(Usage::Unused, Usage::Unseen))
}

/// The rules there; `None` where we may not see them.
async fn rules(client: &Client, path: String) -> Result<Option<Vec<wire::CustomRule>>, CallError> {
    match client.read::<wire::Ruleset>(path, &[]).await {
        Ok((ruleset, _)) => Ok(Some(ruleset.rules.unwrap_or_default())),
        Err(error) if error.is_gone() => Ok(Some(Vec::new())),
        Err(CallError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The account's zones; `None` where we may not see them.
async fn zones(client: &Client, account: &str) -> Result<Option<Vec<wire::Zone>>, CallError> {
    let mut all = Vec::new();
    for page in 1..=ZONES_MAX / ZONES_PAGE + 1 {
        let query =
            [("account.id", account.to_owned()), ("page", page.to_string()), ("per_page", ZONES_PAGE.to_string())];
        match client.read::<Vec<wire::Zone>>("/zones".to_owned(), &query).await {
            Ok((zones, info)) => {
                all.extend(zones);
                if info.total_pages.is_none_or(|pages| pages as usize <= page) {
                    break;
                }
            }
            Err(CallError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(all))
}
