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
    /// We may not see all rules.
    Unseen,
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
    let mut unseen = false;
    match rules(client, format!("/accounts/{account}/{PHASE}")).await? {
        None => {}
        Some(rules) if rules.iter().any(|rule| rule.uses(name)) => return Ok(Usage::Used),
        // What it executes stands elsewhere.
        Some(rules) => unseen |= rules.iter().any(|rule| rule.action == "execute"),
    }
    let Some(zones) = zones(client, account).await? else { return Ok(Usage::Unseen) };
    unseen |= zones.is_empty() || zones.len() > ZONES_MAX;
    for zone in zones.iter().take(ZONES_MAX) {
        match rules(client, format!("/zones/{}/{PHASE}", zone.id)).await? {
            None => unseen = true,
            Some(rules) if rules.iter().any(|rule| rule.uses(name)) => return Ok(Usage::Used),
            Some(_) => {}
        }
    }
    Ok(if unseen { Usage::Unseen } else { Usage::Unused })
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
async fn zones(client: &Client, account: &str) -> Result<Option<Vec<wire::Identified>>, CallError> {
    let mut all = Vec::new();
    for page in 1..=ZONES_MAX / ZONES_PAGE + 1 {
        let query =
            [("account.id", account.to_owned()), ("page", page.to_string()), ("per_page", ZONES_PAGE.to_string())];
        match client.read::<Vec<wire::Identified>>("/zones".to_owned(), &query).await {
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
