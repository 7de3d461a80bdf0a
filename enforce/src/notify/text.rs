//! The texts that are told unless configured, and HTML as Telegram reads it. Pure.

use std::collections::BTreeMap;

use crate::notify::message::Message;
use crate::notify::template::{Escape, PLACEHOLDERS, Template, Values};

/// The word of a message, and its text as HTML.
pub(crate) const HTML: [(&str, &str); 7] = [
    ("alarm", "<b>Alarm</b>: {reason}"),
    (
        "banned",
        "<b>Banned</b> <code>{target}</code> for {ban_time} (offence {ban_count}, rule {rule})\n{reason}\n\
         Host: {host}\nPaths: {paths}\nSeen by: {nodes}\n<a href=\"{look_up}\">Who is that?</a>",
    ),
    (
        "digest",
        "<b>{total} events</b>: {counts}\nRules: {rules}\nAmong them: {targets}\nHosts: {host}\nSeen by: {nodes}\n\
         Alarms: {reason}",
    ),
    (
        "extended",
        "<b>Ban extended</b> <code>{target}</code> for {ban_time} (offence {ban_count}, rule {rule})\n{reason}\n\
         Host: {host}\nPaths: {paths}\nSeen by: {nodes}\n<a href=\"{look_up}\">Who is that?</a>",
    ),
    ("started", "<b>Portcullis started</b> on {node} (version {version})"),
    ("stopped", "<b>Portcullis stopped</b> on {node}; that lifts no ban"),
    ("unbanned", "<b>Unbanned</b> <code>{target}</code> (rule {rule})\n{reason}"),
];

/// Texts by the word of a message.
pub(crate) type Texts = BTreeMap<&'static str, Template>;

/// The texts unless configured.
pub(crate) fn defaults() -> Texts {
    // They are tested to be templates.
    HTML.iter().filter_map(|(word, text)| Some((*word, Template::parse(text, &PLACEHOLDERS).ok()?))).collect()
}

/// The text of a message as HTML.
pub(crate) fn html(texts: &Texts, message: &Message, values: &Values) -> String {
    texts.get(message.word()).map(|text| text.render_lines(values, Escape::Html)).unwrap_or_default()
}

/// The visible text of HTML.
pub(crate) fn plain(html: &str) -> String {
    let (mut out, mut rest) = (String::new(), html);
    while let Some(open) = rest.find('<') {
        out.push_str(&rest[..open]);
        // What no `>` ends is no tag.
        let Some(close) = rest[open..].find('>') else { break };
        rest = &rest[open + close + 1..];
    }
    if !rest.starts_with('<') {
        out.push_str(rest);
    }
    out.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")
}

/// HTML of at most `units_max` UTF-16 units, markup included: cut between characters, outside of tags and entities, and with
/// every open element closed.
pub(crate) fn cut_html(html: &str, units_max: usize) -> String {
    let units = |text: &str| text.encode_utf16().count();
    if units(html) <= units_max {
        return html.to_owned();
    }
    let (mut out, mut used, mut open): (String, usize, Vec<&str>) = (String::new(), 0, Vec::new());
    let closing = |open: &[&str]| open.iter().rev().map(|name| format!("</{name}>")).collect::<String>();
    let mut rest = html;
    while let Some(piece) = first_piece(rest) {
        let mut inside = open.clone();
        if let Some(name) = piece.strip_prefix("</") {
            let name = name.trim_end_matches('>');
            if inside.last() == Some(&name) {
                inside.pop();
            }
        } else if let Some(tag) = piece.strip_prefix('<').filter(|_| piece.ends_with('>')) {
            inside.push(tag.split([' ', '>']).next().unwrap_or_default());
        }
        // Room for what says that it was cut, too.
        if used + units(piece) + 1 + units(&closing(&inside)) > units_max {
            break;
        }
        out.push_str(piece);
        used += units(piece);
        open = inside;
        rest = &rest[piece.len()..];
    }
    out.push('…');
    out + &closing(&open)
}

/// A whole tag, a whole entity, or one character.
fn first_piece(text: &str) -> Option<&str> {
    let first = text.chars().next()?;
    let end = match first {
        '<' => text.find('>'),
        '&' => text.bytes().take(8).position(|byte| byte == b';'),
        _ => None,
    };
    text.get(..end.map_or(first.len_utf8(), |end| end + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::notify::message::samples;

    fn values(message: &Message) -> Values {
        message.values(&Template::parse("https://ipinfo.io/{target}", &["target"]).unwrap())
    }

    /// Whether every tag is closed in order and every `&` begins an entity.
    fn is_well_formed(html: &str) -> bool {
        let (mut rest, mut open) = (html, Vec::new());
        while let Some(piece) = first_piece(rest) {
            rest = &rest[piece.len()..];
            let fine = match piece {
                "<" | "&" => false,
                piece if piece.starts_with("</") => open.pop() == piece.get(2..piece.len() - 1),
                piece if piece.starts_with('<') => {
                    open.push(piece[1..piece.len() - 1].split(' ').next().unwrap());
                    true
                }
                _ => true,
            };
            if !fine {
                return false;
            }
        }
        open.is_empty()
    }

    #[test]
    fn every_message_has_a_text_and_it_is_well_formed() {
        assert_eq!(defaults().len(), HTML.len());
        for message in samples::messages() {
            let html = html(&defaults(), &message, &values(&message));
            assert!(html.len() > 20 && is_well_formed(&html), "{html}");
            assert!(!html.contains("<script>"), "{html}");
        }
    }

    #[test]
    fn a_ban_reads_well() {
        let message = Message::One(samples::banned(7, "forceful-browsing"));
        let html = html(&defaults(), &message, &values(&message));
        let expected = "Banned 203.0.113.7 for 20m (offence 2, rule forceful-browsing)\n\
                        15 requests within 1m (15 x status 404)\nHost: shop.example.net\n\
                        Paths: /<script>, /\"quoted\" & \u{fffd}\nSeen by: edge-1\nWho is that?";
        assert_eq!(plain(&html), expected);
        assert!(html.contains("<a href=\"https://ipinfo.io/203.0.113.7\">"), "{html}");
    }

    #[test]
    fn what_is_short_is_left_alone_and_what_is_long_is_cut_at_a_safe_place() {
        assert_eq!(cut_html("<b>x</b>", 8), "<b>x</b>");
        assert_eq!(cut_html("<b>xyz</b>", 9), "<b>x…</b>");
        assert_eq!(cut_html("a&amp;b&amp;c", 8), "a&amp;b…");
        assert_eq!(cut_html("<a href=\"x\">y</a>", 10), "…");
    }

    proptest! {
        #[test]
        fn cut_html_stays_html(parts in prop::collection::vec("(<b>|<a href=\"x\">)?[a-z&&[^<]ü😀]{0,9}", 0..30), max in 1usize..200) {
            let html: String = parts
                .iter()
                .map(|part| match part.split_once('>') {
                    Some(("<b", text)) => format!("<b>{text}&amp;</b>"),
                    Some((_, text)) => format!("<a href=\"x\">{text}&lt;</a>"),
                    None => part.clone(),
                })
                .collect();
            let cut = cut_html(&html, max);
            prop_assert!(cut.encode_utf16().count() <= max, "{cut}");
            prop_assert!(is_well_formed(&cut), "{cut}");
        }
    }
}
