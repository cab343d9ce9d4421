//! JSON files that show whether they are complete: their last field is the BLAKE3 digest of the file without
//! that field.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::hash::Digest;

const FIELD: &str = ",\n  \"blake3\": \"";
const END: &str = "\"\n}";

/// Writes a value as JSON with its own digest. The value must be a struct or a map, and not an empty one.
pub fn seal(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_string_pretty(value).expect("plain values print as JSON");
    let digest = Digest::of(text.as_bytes());
    text.truncate(text.len() - "\n}".len());
    format!("{text}{FIELD}{digest}{END}").into_bytes()
}

/// Reads a sealed value.
///
/// # Errors
/// A message that says what is wrong: the file is incomplete, was changed, or holds no such value.
pub fn open<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let parts = text.strip_suffix(END).and_then(|text| text.rsplit_once(FIELD));
    let (rest, digest) = parts.ok_or("it does not end with its digest")?;
    let rest = format!("{rest}\n}}");
    if Digest::of(rest.as_bytes()).to_string() != digest {
        return Err("it is not what was written: its digest differs".into());
    }
    serde_json::from_str(&rest).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_sealed_file_opens_and_no_changed_byte_goes_unseen() {
        let value = json!({ "a": 0.1, "b": { "blake3": "x" }, "c": [1, 2] });
        let sealed = seal(&value);
        assert_eq!(open::<Value>(&sealed).unwrap(), value);
        serde_json::from_slice::<Value>(&sealed).unwrap();
        for i in 0..sealed.len() {
            let mut bytes = sealed.clone();
            bytes[i] ^= 1;
            assert!(open::<Value>(&bytes).is_err(), "{i}");
            assert!(open::<Value>(&sealed[..i]).is_err(), "{i}");
        }
    }
}
