//! Records what the program is made of: a hash of its sources, by which manifests and the machines of a
//! cluster tell builds apart, and the versions of the libraries that its results pass through. It also lists
//! the built-in SQL files, and makes the program find LibTorch's libraries at run time.

use std::path::{Path, PathBuf};

/// The folders of sources, relative to this crate's folder.
const SOURCES: [&str; 3] = ["src", "../model/src", "../sql"];

/// Libraries that documents, ids, tables or weights pass through, so that their versions may change results.
const LIBRARIES: [&str; 11] = [
    "arrow",
    "burn-flex",
    "datafusion",
    "flate2",
    "libm",
    "onig_sys",
    "parquet",
    "serde_json",
    "sqlparser",
    "tokenizers",
    "zstd-sys",
];

/// Appends all files below a folder to `into`.
fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { files(&path, into) } else { into.push(path) }
    }
}

/// FNV-1a with 128 bits, which gives the same hash with every compiler.
fn add(hash: u128, bytes: &[u8]) -> u128 {
    let prime = (1 << 88) + 0x13b;
    bytes.iter().fold(hash, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(prime))
}

/// The names and versions of the [`LIBRARIES`] that the workspace's lock file has.
fn versions(lock: &str) -> Vec<String> {
    let packages = lock.split("[[package]]").filter_map(|package| {
        let value = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "))?;
            Some(line.trim_matches('"').to_owned())
        };
        let name = value("name").filter(|name| LIBRARIES.contains(&name.as_str()))?;
        Some(format!("{name} {}", value("version")?))
    });
    packages.collect()
}

/// Writes the list of all SQL files, by their paths in the repository, for `sql::BUILT_IN`.
fn built_in(sources: &[PathBuf]) {
    let mut list = String::from("&[\n");
    for path in sources.iter().filter(|path| path.extension().is_some_and(|ending| ending == "sql")) {
        if let (Ok(name), Ok(whole)) = (path.strip_prefix(".."), path.canonicalize()) {
            list += &format!("    ({name:?}, include_str!({whole:?})),\n");
        }
    }
    let out = std::env::var_os("OUT_DIR").expect("cargo sets it");
    std::fs::write(Path::new(&out).join("built_in.rs"), list + "]").expect("OUT_DIR can be written to");
}

fn main() {
    let mut sources = vec![];
    for folder in SOURCES {
        println!("cargo:rerun-if-changed={folder}");
        files(folder.as_ref(), &mut sources);
    }
    sources.sort();
    built_in(&sources);
    let mut hash = 0x6c62272e07bb014262b821756295c58d;
    for path in sources {
        let bytes = std::fs::read(&path).unwrap_or_default();
        hash = add(hash, path.to_string_lossy().as_bytes());
        hash = add(hash, &(bytes.len() as u64).to_le_bytes());
        hash = add(hash, &bytes);
    }
    println!("cargo:rustc-env=LENGTHWISE_SOURCES={hash:032x}");

    println!("cargo:rerun-if-changed=../Cargo.lock");
    let mut libraries = versions(&std::fs::read_to_string("../Cargo.lock").unwrap_or_default());
    let compiler = std::env::var_os("RUSTC")
        .and_then(|rustc| std::process::Command::new(rustc).arg("--version").output().ok());
    let compiler = compiler.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    libraries.extend(compiler.iter().filter_map(|text| Some(format!("rustc {}", text.split(' ').nth(1)?))));
    println!("cargo:rustc-env=LENGTHWISE_LIBRARIES={}", libraries.join(","));

    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_LIBTORCH").is_some()
        && let Ok(root) = std::env::var("LIBTORCH")
    {
        // as DT_RPATH, so that the libraries find each other too
        println!("cargo:rustc-link-arg=-Wl,-rpath,{root}/lib,--disable-new-dtags");
    }
}
