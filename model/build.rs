//! Compiles the shims for the parts of LibTorch that `tch` does not bind, and sets the path at which tests find LibTorch.

fn main() {
    println!("cargo:rustc-check-cfg=cfg(gloo)");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    #[cfg(feature = "libtorch")]
    libtorch();
}

#[cfg(feature = "libtorch")]
fn libtorch() {
    use std::path::Path;
    let Some(root) = std::env::var_os("LIBTORCH") else {
        panic!("the feature `libtorch` needs LIBTORCH: export LIBTORCH=$(model/libtorch.sh DIR)");
    };
    let root = Path::new(&root);
    let mut build = cc::Build::new();
    build.cpp(true).pic(true).warnings(false).flag("-std=c++17").flag("-D_GLIBCXX_USE_CXX11_ABI=1");
    build.include(root.join("include")).include(root.join("include/torch/csrc/api/include"));
    build.define("USE_DISTRIBUTED", None);
    let gloo = root.join("gloo/usr/include");
    if gloo.exists() {
        build.include(gloo).define("USE_C10D_GLOO", None).define("LENGTHWISE_GLOO", None);
        println!("cargo:rustc-cfg=gloo");
    }
    if root.join("lib/libtorch_cuda.so").exists() {
        build.define("USE_C10D_NCCL", None).define("LENGTHWISE_NCCL", None);
    }
    for file in ["src/comm/c10d.cpp", "src/attention/cuda.cpp"] {
        println!("cargo:rerun-if-changed={file}");
        build.file(file);
    }
    build.compile("lengthwise_torch");
    println!("cargo:rustc-link-search=native={}/lib", root.display());
    // Use DT_RPATH, so that the libraries find each other, too.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}/lib,--disable-new-dtags", root.display());
}
