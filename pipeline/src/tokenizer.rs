//! stub
#[derive(Debug, thiserror::Error)]
#[error("tokenizer")]
pub struct TokenizerError;
pub struct Tokenizer(tokenizers::Tokenizer);
pub struct Encoder<'a>(&'a Tokenizer);
impl Tokenizer {
    pub fn from_json(json: &[u8], _name: &str) -> Result<Self, TokenizerError> {
        tokenizers::Tokenizer::from_bytes(json).map(Tokenizer).map_err(|_| TokenizerError)
    }
    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }
    pub fn bos(&self) -> Option<u32> {
        self.0.token_to_id("<s>")
    }
    pub fn eos(&self) -> Option<u32> {
        None
    }
    pub fn special(&self, names: &[&str]) -> Option<u32> {
        names.iter().find_map(|n| self.0.token_to_id(n))
    }
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder(self)
    }
}
impl Encoder<'_> {
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        ids.extend(self.0.0.encode_fast(text, false).map_err(|_| TokenizerError)?.get_ids());
        Ok(())
    }
}
pub fn train<'a>(_t: impl Iterator<Item = &'a str>, _v: usize) -> Result<Vec<u8>, TokenizerError> {
    Err(TokenizerError)
}
