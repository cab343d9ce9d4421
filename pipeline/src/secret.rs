//! Credentials come from the environment. A URL that carries one is refused, and the credential is never
//! shown.

/// URL schemes. A path that begins with one of them is probably a URL whose colon or slash was forgotten.
pub const SCHEMES: [&str; 11] =
    ["s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https", "file"];

/// Parts of the names of query parameters that carry credentials, as in URLs signed by S3 or Google.
const SECRET_PARAMETERS: [&str; 6] = ["key", "token", "secret", "signature", "credential", "passw"];

/// The parameter that holds Azure's signature. It is compared whole, because it is too short to look for
/// inside other names.
const AZURE_SIGNATURE: &str = "sig";

/// In Azure's URLs of these schemes the part before `@` is the container, not a user.
const CONTAINER_SCHEMES: [&str; 2] = ["abfs", "abfss"];

/// Where the next URL of a text begins, and where the part after its `://` begins. Misspelt forms such as
/// `s3:/` and `s3//` are found, too.
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

/// Whether this URL carries a password, a key or a signature.
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
    // A secret key that contains `/`, as in `s3://key:se/cret@bucket`, looks like a port that is not a
    // number.
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

/// The text, with each URL that carries a secret replaced by asterisks after its `://`. The length stays the
/// same, so that byte ranges remain valid.
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

/// Parts of the names of environment variables that hold secrets.
const SECRET: [&str; 8] =
    ["KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL", "SERVICE_ACCOUNT", "HEADERS", "PROXY"];

/// The text, with each value of an environment variable that may be a secret replaced by the variable's name.
/// Storage services may repeat tokens in their responses.
pub fn hide(text: String) -> String {
    let secrets = std::env::vars_os().filter_map(|(name, value)| {
        let (name, value) = (name.into_string().ok()?, value.into_string().ok()?);
        let value = value.trim().to_owned();
        // a shorter value is not a secret, and could be part of any word
        let secret = value.len() >= 8 && SECRET.iter().any(|sign| name.to_ascii_uppercase().contains(sign));
        secret.then_some((name, value))
    });
    secrets.fold(text, |text, (name, value)| match text.contains(&value) {
        true => text.replace(&value, &format!("${name}")),
        false => text,
    })
}
