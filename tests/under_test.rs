//! The binary under test: the same program as `lengthwise`, where these tests find it.

fn main() -> std::process::ExitCode {
    lengthwise::cli::main()
}
