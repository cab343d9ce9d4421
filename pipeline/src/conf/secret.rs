//! Credentials come from the environment; one that is typed into a URL is refused, and never shown.

/// What the names of query parameters that carry credentials contain, as in URLs signed by S3 or Google …
const SECRET_PARAMETERS: [&str; 6] = ["key", "token", "secret", "signature", "credential", "passw"];

/// … and the one that Azure signs with, which is too short to be looked for inside other names.
const AZURE_SIGNATURE: &str = "sig";

/// In these URLs of Azure, what stands before `@` is the container, not a user.
const CONTAINER_SCHEMES: [&str; 2] = ["abfs", "abfss"];

/// Does this URL carry a password, a key or a signature?
pub fn in_url(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else { return false };
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
    while let Some(colon) = rest.find("://") {
        let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        let scheme = rest[..colon].trim_end_matches(is_scheme).len();
        let ends = |c: char| c.is_whitespace() || "\"'`".contains(c);
        let end = rest[colon..].find(ends).map_or(rest.len(), |length| colon + length);
        masked.push_str(&rest[..colon + 3]);
        match in_url(&rest[scheme..end]) {
            true => masked.extend(std::iter::repeat_n('*', end - colon - 3)),
            false => masked.push_str(&rest[colon + 3..end]),
        }
        rest = &rest[end..];
    }
    masked + rest
}
