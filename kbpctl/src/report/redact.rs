//! Takes out what looks secret. Rather too much than too little: who wants to know a value can ask for it.

use serde_json::Value;

/// What stands in its place.
pub(crate) const REMOVED: &str = "[removed]";

/// Parts of a name whose value is not told.
const SECRET: [&str; 15] = [
    "token",
    "secret",
    "passw",
    "passphrase",
    "auth",
    "credential",
    "apikey",
    "api_key",
    "api-key",
    "private",
    "cert",
    "cookie",
    "session",
    "bearer",
    "env",
];

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET.iter().any(|word| name.contains(word))
        || name == "key"
        || name.ends_with("_key")
        || name.ends_with("-key")
}

/// A JSON value without secrets: those of members whose names say so, annotations that are not kbp's, and what looks like one in texts.
pub(super) fn value(of: &Value) -> Value {
    match of {
        Value::Object(members) => {
            let clean = members.iter().map(|(name, inner)| {
                let inner = match name.as_str() {
                    "annotations" => annotations(inner),
                    _ if is_secret(name) && !inner.is_boolean() && !inner.is_null() => {
                        Value::String(REMOVED.to_owned())
                    }
                    _ => value(inner),
                };
                (name.clone(), inner)
            });
            Value::Object(clean.collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(value).collect()),
        Value::String(string) => Value::String(text(string)),
        other => other.clone(),
    }
}

/// Of annotations only kbp's own are told.
fn annotations(of: &Value) -> Value {
    match of {
        Value::Object(members) => Value::Object(
            members
                .iter()
                .filter(|(name, _)| name.starts_with("kbp.io/"))
                .map(|(name, inner)| (name.clone(), value(inner)))
                .collect(),
        ),
        Value::Array(_) => value(of),
        _ => Value::String(REMOVED.to_owned()),
    }
}

/// Text without secrets: the value of `NAME=…` and `NAME: …` where the name says so, user and password of URLs, and long random words.
pub(crate) fn text(of: &str) -> String {
    let mut out = String::new();
    for line in of.split_inclusive('\n') {
        out += &clean_line(line);
    }
    out
}

fn clean_line(line: &str) -> String {
    let (body, end) = match line.strip_suffix('\n') {
        Some(body) => (body, "\n"),
        None => (line, ""),
    };
    // A name before the first separator decides over the rest of the line.
    if let Some(at) = body.find(['=', ':'])
        && !body[at..].starts_with("://")
    {
        // Its last word: a comment's sign or another word may stand before.
        let name = body[..at].split_whitespace().last().unwrap_or_default();
        let rest = body[at + 1..].trim();
        if is_secret(name)
            && !matches!(
                rest.trim_end_matches(','),
                "" | "{" | "[" | "true" | "false" | "null" | "{}" | "[]"
            )
        {
            return format!("{}{REMOVED}{end}", &body[..=at]);
        }
    }
    let mut words = Vec::new();
    let mut hide_next = false;
    for word in body.split(' ') {
        let hidden = hide_next && !word.is_empty();
        if hidden {
            hide_next = false;
        }
        words.push(if hidden {
            REMOVED.to_owned()
        } else {
            clean_word(word)
        });
        // `Authorization: Bearer x`, `--token x`.
        let bare = word
            .trim_matches(['"', '\'', ',', ':', '-'])
            .to_ascii_lowercase();
        if matches!(
            bare.as_str(),
            "bearer" | "basic" | "token" | "password" | "passwd" | "secret"
        ) && (word.starts_with('-')
            || word.ends_with(':')
            || matches!(bare.as_str(), "bearer" | "basic"))
        {
            hide_next = true;
        }
    }
    words.join(" ") + end
}

fn clean_word(word: &str) -> String {
    // user:password@ of a URL.
    if let Some(scheme) = word.find("://")
        && let Some(at) = word[scheme + 3..].find('@')
    {
        let host = &word[scheme + 3 + at + 1..];
        return format!("{}{REMOVED}@{host}", &word[..scheme + 3]);
    }
    if let Some((name, value)) = word.split_once('=')
        && is_secret(name)
        && !value.is_empty()
    {
        return format!("{name}={REMOVED}");
    }
    let bare = word.trim_matches(['"', '\'', ',', ';', '(', ')', '[', ']', '{', '}']);
    if looks_random(bare) {
        return word.replace(bare, REMOVED);
    }
    word.to_owned()
}

/// Long, and of letters of both cases and digits as no name is: a key or a token. Ids are hexadecimal, and stay.
fn looks_random(word: &str) -> bool {
    let has = |f: fn(&u8) -> bool| word.bytes().any(|b| f(&b));
    word.len() >= 24
        && word
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+/=_-.".contains(&b))
        && has(u8::is_ascii_uppercase)
        && has(u8::is_ascii_lowercase)
        && has(u8::is_ascii_digit)
        && !word.starts_with(['/', '.'])
        && !word.contains("://")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_looks_secret_is_gone() {
        for secret in [
            "API_TOKEN=hunter2",
            "password: hunter2",
            "# api_token = hunter2",
            "  the db_password = \"hunter2\"",
            "\"password\": \"hunter2\",",
            "login https://joe:hunter2@registry/x",
            "Authorization: Bearer hunter2",
            "run --token hunter2 now",
            "key = \"hunter2\"",
            "x REGISTRY_AUTH=hunter2 y",
            "eyJhbGciOiJIUzI1NiIsInR5cCIhunter2",
        ] {
            let clean = text(secret);
            assert!(!clean.contains("hunter2"), "{secret}: {clean}");
            assert!(clean.contains(REMOVED), "{secret}: {clean}");
        }
    }

    #[test]
    fn what_a_fault_is_about_stays() {
        for plain in [
            "worker: auto: no pool\n",
            "cpus = \"2-3\"\n",
            "k8s.io/3f2a9c0d1e4b5a697887766554433221100ffeeddccbbaa99887766554433221\n",
            "/usr/lib/cni/host-local said: no such file\n",
            "kernel.io_uring_disabled = 0\n",
        ] {
            assert_eq!(text(plain), plain);
        }
    }

    #[test]
    fn json_is_cleaned_by_its_names() {
        let clean = value(&json!({
            "name": "n",
            "plugins": [{ "type": "x", "authToken": "hunter2", "env": ["A=hunter2"], "mtu": 9000 }],
            "annotations": { "kbp.io/worker": "idle", "vault": "hunter2" },
            "note": "PASSWORD=hunter2",
        }));
        let text = clean.to_string();
        assert!(!text.contains("hunter2"), "{text}");
        assert_eq!(clean["plugins"][0]["mtu"], 9000);
        assert_eq!(clean["annotations"], json!({ "kbp.io/worker": "idle" }));
    }
}
