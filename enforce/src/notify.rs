//! Telling people and programs what happens: Telegram and webhooks.
//!
//! Each notifier is a task with its own queue ([`queue`]), pace and health. Events become messages ([`message`]) one by one
//! while they are few, and one digest a minute while they are many; nothing is left out uncounted. On a cluster one host at
//! a time tells, and its successor goes on where it left off.

pub(crate) mod digest;
pub(crate) mod http;
pub(crate) mod kept;
pub(crate) mod message;
pub(crate) mod queue;
pub(crate) mod runner;
pub(crate) mod telegram;
pub(crate) mod template;
pub(crate) mod text;
pub(crate) mod webhook;

use crate::action::Surroundings;
use crate::config::EnforceConfig;
use crate::notify::runner::{Channel, Notifier};
use crate::notify::telegram::Telegram;
use crate::notify::webhook::Webhook;

/// Those that are configured, ready to run.
pub(crate) fn configured(config: &EnforceConfig, around: &Surroundings) -> Vec<Notifier> {
    let telegram = config.telegram.iter().map(|config| {
        let channel = Channel::Telegram(Box::new(Telegram::new(config.clone(), &around.clock)));
        Notifier::new("telegram".to_owned(), config.events.clone(), channel, around)
    });
    let webhooks = config.webhooks.iter().map(|config| {
        let channel = Channel::Webhook(Box::new(Webhook::new(config.clone(), around.clock.clone())));
        Notifier::new(format!("webhook-{}", config.name), config.events.clone(), channel, around)
    });
    telegram.chain(webhooks).collect()
}
