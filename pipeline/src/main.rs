//! The `lengthwise` binary.

/// Large buffers come and go with every part; this allocator keeps their pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    lengthwise::cli::main()
}
