# Short names for the commands of .ci/run, CONTRIBUTING.md and docs/measurements/data.md.

_list:
    @{{ just_executable() }} --list --unsorted

# Spelling, SQL, crates, format, clippy
check:
    typos
    sqlfluff lint sql pipeline/src/cli/init
    cargo-deny --locked check bans licenses sources
    cargo fmt --all --check
    cargo clippy --release --workspace --features lengthwise/cluster --all-targets -- -D warnings

# All tests but the slow proofs
test:
    cargo test --release

# A slow proof by a part of its name: twenty_kills, every_file, a_hundred_random_kills, …
slow name:
    cargo test --release --test e2e -- --ignored {{ name }} --nocapture

# Beside what others take for the same, as docs/measurements/data.md has it
bench corpus tokenizer:
    cargo build --release
    python3 tests/peers.py target/release/lengthwise {{ corpus }} {{ tokenizer }} --rounds 5
