//! The conf: any text either is an error with a place in it, or a conf that parses again from its own output.
#![no_main]

use lengthwise::conf::Conf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Conf::parse(text, "conf.toml", &[], &|_| None) {
        Ok(conf) => {
            let again =
                Conf::parse(&conf.to_toml(), "conf.toml", &[], &|_| None).expect("what it wrote itself");
            assert_eq!(again.to_toml(), conf.to_toml());
        }
        Err(error) => assert_eq!(error.exit_code(), 2),
    }
});
