//! The `lengthwise` binary.

fn main() -> std::process::ExitCode {
    lengthwise::cli::main()
}
