//! Names the sources, so that machines of a cluster can tell whether they have the same ones; and has the program find
//! LibTorch's libraries where they are.

use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

/// All files below a folder.
fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { files(&path, into) } else { into.push(path) }
    }
}

fn main() {
    println!("cargo:rerun-if-changed=src");
    let mut sources = vec![];
    files("src".as_ref(), &mut sources);
    sources.sort();
    let mut hasher = DefaultHasher::new();
    for path in sources {
        hasher.write(path.to_string_lossy().as_bytes());
        hasher.write(&std::fs::read(&path).unwrap_or_default());
    }
    println!("cargo:rustc-env=LENGTHWISE_SOURCES={:016x}", hasher.finish());
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_LIBTORCH").is_some()
        && let Ok(root) = std::env::var("LIBTORCH")
    {
        // as DT_RPATH, so that the libraries find each other too
        println!("cargo:rustc-link-arg=-Wl,-rpath,{root}/lib,--disable-new-dtags");
    }
}
