//! Has the program find LibTorch's libraries where they are.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_LIBTORCH").is_some()
        && let Ok(root) = std::env::var("LIBTORCH")
    {
        // as DT_RPATH, so that the libraries find each other too
        println!("cargo:rustc-link-arg=-Wl,-rpath,{root}/lib,--disable-new-dtags");
    }
}
