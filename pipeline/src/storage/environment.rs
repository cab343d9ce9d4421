//! Reads environment variables as people set them. White space around a value is ignored, an empty value
//! counts as not set, and an unusable one is refused with the variable's name. No value is shown, because it
//! may be a secret.
//!
//! object_store panics on some values and prints others, so values are checked before it gets them.

use std::ffi::OsString;

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use crate::{Error, Result};

/// The value of a variable, if it is set.
///
/// # Errors
/// It is not UTF-8.
pub fn variable(name: &str) -> Result<Option<String>> {
    std::env::var_os(name).map_or(Ok(None), |value| text(name, value))
}

/// The value of a variable that is a web address, without a slash at its end.
///
/// # Errors
/// It is not an http or https address.
pub fn address(name: &str) -> Result<Option<String>> {
    variable(name)?.map(|value| web(name, &value)).transpose()
}

/// The HTTP header that `of` makes of the value of a variable, if that is set.
///
/// # Errors
/// It has characters that a header cannot have.
pub fn header(name: &str, of: impl Fn(&str) -> String) -> Result<Option<HeaderValue>> {
    let header = |value: String| HeaderValue::from_str(&of(&value)).map_err(|_| wrong(name, UNPRINTABLE));
    variable(name)?.map(header).transpose()
}

/// The headers of a variable that lists them, `NAME=VALUE,…`.
///
/// # Errors
/// It is not such a list.
pub fn headers(name: &str) -> Result<Vec<(HeaderName, HeaderValue)>> {
    let all = variable(name)?.unwrap_or_default();
    let headers = all.split(',').map(str::trim).filter(|header| !header.is_empty()).map(|header| {
        let (key, value) = header.split_once('=')?;
        Some((key.trim().parse().ok()?, value.trim().parse().ok()?))
    });
    headers.collect::<Option<_>>().ok_or_else(|| wrong(name, "it is no list of headers, NAME=VALUE,…"))
}

fn text(name: &str, value: OsString) -> Result<Option<String>> {
    let value = value.into_string().map_err(|_| wrong(name, "it is not UTF-8"))?;
    Ok(Some(value.trim().to_owned()).filter(|value| !value.is_empty()))
}

fn web(name: &str, value: &str) -> Result<String> {
    let is_web = |url: &Url| ["http", "https"].contains(&url.scheme()) && url.has_host();
    match Url::parse(value) {
        // the URL parser drops line breaks silently
        Ok(url) if is_web(&url) && !value.contains(char::is_control) => {
            Ok(url.as_str().trim_end_matches('/').to_owned())
        }
        _ => Err(wrong(name, "it is no address that begins with http:// or https://")),
    }
}

/// A web address without secrets, because the library shows it when a request fails.
fn open_web(name: &str, value: &str) -> Result<String> {
    let has_secret =
        |url: Url| !url.username().is_empty() || url.password().is_some() || url.query().is_some();
    match Url::parse(value).is_ok_and(has_secret) {
        true => Err(wrong(name, "there is a user, a password or a query in the address")),
        false => web(name, value),
    }
}

fn printable(name: &str, value: String) -> Result<String> {
    match value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        true => Ok(value),
        false => Err(wrong(name, UNPRINTABLE)),
    }
}

const UNPRINTABLE: &str = "it has a line break in it, or a character that is not ASCII";

fn wrong(name: &str, why: &str) -> Error {
    let help = "set it right, or not at all; its value is not shown, for it may be a secret";
    Error::usage(format!("the variable {name} of the environment can't be used: {why}"), help)
}

/// A setting of a cloud: the variable's name, the library's key, and the value.
pub type Setting<K> = (String, K, String);

/// The settings of a cloud, from the variables that begin with `prefix`. `key` maps a variable's name in
/// lower case to the library's key, or to `None` if there is none.
///
/// # Errors
/// The library could not use a value.
pub fn settings<K>(prefix: &str, key: impl Fn(&str) -> Option<K>) -> Result<Vec<Setting<K>>> {
    let mut settings = vec![];
    for (name, value) in std::env::vars_os() {
        let Some(name) = name.to_str().filter(|name| name.starts_with(prefix)) else { continue };
        let Some(key) = key(&name.to_ascii_lowercase()) else { continue };
        let Some(value) = text(name, value)? else { continue };
        settings.push((name.to_owned(), key, usable(name, value)?));
    }
    // the order of the environment is arbitrary
    settings.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    Ok(settings)
}

/// Checks that the library takes a value without a panic, and returns the value to give it.
fn usable(name: &str, value: String) -> Result<String> {
    let is = |signs: &[&str]| signs.iter().any(|sign| name.contains(sign));
    if name == "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE" {
        // the content of the file is sent in a request's header; a file that cannot be read now may be there
        // later
        if let Ok(token) = std::fs::read_to_string(&value) {
            printable(name, token)?;
        }
        Ok(value)
    } else if is(&[
        "_FILE",
        "_PATH",
        "_CERTIFICATE",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ]) {
        // paths, and texts of several lines
        if !is(&["_KEY", "_CERTIFICATE"]) && value.starts_with('{') {
            return Err(wrong(
                name,
                "it is the path of a key's file; GOOGLE_SERVICE_ACCOUNT_KEY takes the key itself",
            ));
        }
        if name.starts_with("GOOGLE_") && !is(&["_KEY"]) {
            google_key(name, &value)?;
        }
        Ok(value)
    } else if is(&["FULL_URI"]) {
        web(name, &value)
    } else if is(&["ENDPOINT", "_URL", "AUTHORITY_HOST"]) && !is(&["_USE_"]) {
        open_web(name, &value)
    } else if is(&["RELATIVE_URI"]) && value.starts_with('/') {
        Ok(web(name, &format!("http://x{value}"))?["http://x".len()..].to_owned())
    } else if is(&["REGION", "TENANT_ID", "AUTHORITY_ID", "ACCOUNT_NAME", "RELATIVE_URI", "WORKLOAD_HOST"]) {
        // a part of an address
        match value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            true => Ok(value),
            false => Err(wrong(name, "it has characters that such a name has not")),
        }
    } else {
        printable(name, value)
    }
}

/// Checks that a file holds a Google key, because the library says only that it cannot start.
fn google_key(name: &str, path: &str) -> Result<()> {
    let key =
        std::fs::read(path).map_err(|error| wrong(name, &format!("its file cannot be read: {error}")))?;
    match serde_json::from_slice::<serde_json::Value>(&key) {
        Ok(key) if key.is_object() => Ok(()),
        _ => Err(wrong(name, "its file is no JSON object, as Google's keys are")),
    }
}

/// The error for settings of a cloud that are inconsistent. `culprits` are the settings whose removal would
/// make the rest consistent.
pub fn refused<'a>(scheme: &str, culprits: impl Iterator<Item = &'a str>) -> Error {
    let culprits: Vec<_> = culprits.collect();
    if !culprits.is_empty() {
        let why = "its value is none, or lacks another variable's that belongs to it, or is one too many";
        return wrong(&culprits.join(" or "), why);
    }
    let message = format!("the environment lacks what {scheme}:// needs, or it does not hold together");
    Error::usage(message, crate::error::variables(scheme).unwrap_or("the README lists the variables"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn what_the_library_would_panic_at_is_refused_by_name_and_nothing_of_it_is_told() {
        for (name, value) in [
            ("AWS_ENDPOINT", "planted-secret:9000"),
            ("AWS_ENDPOINT", "http://planted-secret\nx"),
            ("AWS_ENDPOINT", "s3://planted-secret"),
            ("AWS_ENDPOINT", "http://u:planted-secret@127.0.0.1:9000"),
            ("AWS_ENDPOINT_URL_S3", "http://planted-secret@127.0.0.1:9000"),
            ("AWS_ENDPOINT", "http://127.0.0.1:9000/?token=planted-secret"),
            ("AWS_METADATA_ENDPOINT", "http://"),
            ("AWS_REGION", "planted secret"),
            ("AWS_REGION", "planted/secret"),
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "planted secret"),
            ("AWS_ACCESS_KEY_ID", "planted-\nsecret"),
            ("AWS_SESSION_TOKEN", "planted-\u{e9}-secret"),
            ("AZURE_STORAGE_ACCOUNT_NAME", "planted\nsecret"),
            ("AZURE_STORAGE_ACCOUNT_NAME", "planted.secret/x"),
            ("AZURE_STORAGE_ENDPOINT", "planted.secret"),
            ("AZURE_STORAGE_TOKEN", "planted\u{7f}secret"),
            ("AZURE_TENANT_ID", "planted secret"),
            ("GOOGLE_BASE_URL", "planted.secret"),
            ("GOOGLE_SERVICE_ACCOUNT", "{\"private_key\": \"planted-secret\"}"),
            ("GOOGLE_APPLICATION_CREDENTIALS", "{planted-secret"),
        ] {
            let refused = usable(name, value.to_owned()).unwrap_err();
            let said = refused.in_a_line();
            assert!(refused.exit_code() == 2 && said.contains(name), "{said}");
            assert!(!said.contains("planted") && !said.contains("secret:"), "{said}");
        }
        assert!(text("AWS_REGION", OsString::from_vec(b"eu\xff".to_vec())).is_err());
        for (path, why) in [("/planted-secret", "cannot be read"), ("Cargo.toml", "is no JSON object")] {
            let said = usable("GOOGLE_APPLICATION_CREDENTIALS", path.into()).unwrap_err().in_a_line();
            assert!(said.contains(why) && !said.contains("planted"), "{said}");
        }
    }

    #[test]
    fn white_space_around_a_value_is_none_of_it_and_an_empty_one_is_not_set() {
        let set = |value: &str| text("X", value.into()).unwrap();
        assert_eq!((set(""), set(" \n"), set("key\r\n")), (None, None, Some("key".into())));
        for (name, value, used) in [
            ("AWS_ENDPOINT", "http://[::1]:9000/", "http://[::1]:9000"),
            ("AWS_ENDPOINT_URL", "https://storage.example.com/a b", "https://storage.example.com/a%20b"),
            ("AWS_SECRET_ACCESS_KEY", "a+/b c=", "a+/b c="),
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/a?b=c", "/v2/a?b=c"),
            ("AZURE_USE_FABRIC_ENDPOINT", "true", "true"),
            ("GOOGLE_SERVICE_ACCOUNT_KEY", "{\n}", "{\n}"),
        ] {
            assert_eq!(usable(name, value.to_owned()).unwrap(), used, "{name}");
        }
    }
}
