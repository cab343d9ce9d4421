//! Files that lie among a source's files and are not read.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why something that looks like data is not read. The names are written to manifests, so they stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    OtherFormat,
    Compressed,
    Deeper,
    Empty,
    NoFile,
    DeadLink,
    Loop,
    EmptyFolder,
}

impl Why {
    /// The reason in words, to follow a number.
    pub fn says(self) -> &'static str {
        match self {
            Why::OtherFormat => "whose names have none of the format's endings",
            Why::Compressed => "compressed or put together in a way that is not read",
            Why::Deeper => "in folders that the url's last `*` does not enter, as `**` would",
            Why::Empty => "empty",
            Why::NoFile => "no files: pipes, sockets or devices",
            Why::DeadLink => "links to what isn't there",
            Why::Loop => "links to a folder that they lie in",
            Why::EmptyFolder => "folders with nothing to read in them",
        }
    }
}

/// All that is not read for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unread {
    pub why: Why,
    /// How many files there are.
    pub files: u64,
    /// The first few of them.
    pub first: Vec<String>,
}

impl Unread {
    /// How many URLs are named.
    const FEW: usize = 3;

    /// Groups unread files by reason.
    pub fn all(unread: &[(Why, String)]) -> Vec<Self> {
        let mut all: BTreeMap<Why, Self> = BTreeMap::new();
        for (why, url) in unread {
            let of = all.entry(*why).or_insert(Self { why: *why, files: 0, first: vec![] });
            of.files += 1;
            if of.first.len() < Self::FEW {
                of.first.push(url.clone());
            }
        }
        all.into_values().collect()
    }

    /// Sums up all reasons in a line, as in `3 files are not read: 2 compressed or put together in a way that
    /// is not read (…), 1 empty (…)`.
    pub fn summary(all: &[Self]) -> String {
        let files: u64 = all.iter().map(|unread| unread.files).sum();
        let each = all.iter().map(|Unread { why, files, first }| {
            let more = if *files > first.len() as u64 { ", …" } else { "" };
            let first = first.iter().map(|url| format!("`{url}`")).collect::<Vec<_>>().join(", ");
            format!("{files} {} ({first}{more})", why.says())
        });
        let are = if files == 1 { "file is" } else { "files are" };
        format!("{files} {are} not read: {}", each.collect::<Vec<_>>().join(", "))
    }
}
