//! Credentials come from the environment; one that is typed into a URL is refused, and never shown.

/// What a path begins with where a URL's colon or slash was forgotten.
pub const SCHEMES: [&str; 11] =
    ["s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https", "file"];

/// What the names of query parameters that carry credentials contain, as in URLs signed by S3 or Google …
const SECRET_PARAMETERS: [&str; 6] = ["key", "token", "secret", "signature", "credential", "passw"];

/// … and the one that Azure signs with, which is too short to be looked for inside other names.
const AZURE_SIGNATURE: &str = "sig";

/// In these URLs of Azure, what stands before `@` is the container, not a user.
const CONTAINER_SCHEMES: [&str; 2] = ["abfs", "abfss"];

/// Where in a text the next URL begins, and what follows its `://`; also where that is misspelt, as in `s3:/` and `s3//`.
fn next_url(text: &str) -> Option<(usize, usize)> {
    text.match_indices([':', '/']).find_map(|(at, _)| {
        let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        let begin = text[..at].trim_end_matches(is_scheme).len();
        let sign = if text[at..].starts_with("://") {
            3
        } else if !SCHEMES.contains(&&text[begin..at]) {
            return None;
        } else if text[at..].starts_with(":/") || text[at..].starts_with("//") {
            2
        } else if text[at..].starts_with(':') {
            1
        } else {
            return None;
        };
        Some((begin, at + sign))
    })
}

/// Does this URL carry a password, a key or a signature?
pub fn in_url(url: &str) -> bool {
    let Some((begin, path)) = next_url(url) else { return false };
    let (scheme, rest) = (url[begin..path].trim_end_matches([':', '/']), &url[path..]);
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    let is_container = CONTAINER_SCHEMES.iter().any(|name| scheme.eq_ignore_ascii_case(name));
    if user.is_some_and(|user| !is_container || user.contains(':')) {
        return true;
    }
    // A secret key with `/` in it, `s3://key:se/cret@bucket`, looks like a port that is no number.
    let port = host.rsplit_once(':').map_or("", |(_, port)| port);
    if !port.chars().all(|c| c.is_ascii_digit()) && !host.ends_with(']') && !host.contains("${") {
        return true;
    }
    let query = path.split_once('?').map_or("", |(_, query)| query);
    query.split(['&', '#']).filter_map(|pair| pair.split_once('=')).any(|(name, _)| {
        let name = name.to_ascii_lowercase();
        name == AZURE_SIGNATURE || SECRET_PARAMETERS.iter().any(|secret| name.contains(secret))
    })
}

/// The text with each URL that carries a secret starred out from its `://` on. Lengths stay, so places hold.
pub fn mask(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((scheme, path)) = next_url(rest) {
        let ends = |c: char| c.is_whitespace() || "\"'`".contains(c);
        let end = rest[path..].find(ends).map_or(rest.len(), |length| path + length);
        masked.push_str(&rest[..path]);
        match in_url(&rest[scheme..end]) {
            true => masked.extend(std::iter::repeat_n('*', end - path)),
            false => masked.push_str(&rest[path..end]),
        }
        rest = &rest[end..];
    }
    masked + rest
}

/// What the names of variables with secrets in them contain.
const SECRET: [&str; 8] =
    ["KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL", "SERVICE_ACCOUNT", "HEADERS", "PROXY"];

/// The text with the name of the variable wherever the value of one that may be a secret stands in it: stores tell tokens in
/// their answers.
pub fn hide(text: String) -> String {
    let secrets = std::env::vars_os().filter_map(|(name, value)| {
        let (name, value) = (name.into_string().ok()?, value.into_string().ok()?);
        let value = value.trim().to_owned();
        // what is shorter is no secret, and may be a part of any word
        let secret = value.len() >= 8 && SECRET.iter().any(|sign| name.to_ascii_uppercase().contains(sign));
        secret.then_some((name, value))
    });
    secrets.fold(text, |text, (name, value)| match text.contains(&value) {
        true => text.replace(&value, &format!("${name}")),
        false => text,
    })
}
