//! Loads a `tokenizer.json` and computes the ids of documents. The ids are exactly those of Hugging Face's
//! `tokenizers`, in time linear in the document's length.
//!
//! A tokenizer without pre-tokenizer, such as LLaMA's, treats a whole document as one word, and merging slows
//! down with the length of the word. However, a merge can join two adjacent characters only if its left side
//! ends with the first and its right side begins with the second. If no merge fits a pair of characters,
//! nothing is ever joined between them. The text can be cut there and the pieces encoded separately, each
//! distinct piece only once. Whether this gives the same ids is read from the file when it is loaded. If it
//! does not, the library encodes whole texts.

use std::sync::Mutex;

use aho_corasick::{AhoCorasick, MatchKind};
use hashbrown::HashMap;
use serde_json::Value;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, Encoding, Model, ModelWrapper, NormalizedString, Normalizer,
    NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
};

use crate::error::TokenizerError;

/// What the ids of a text depend on besides the file: the version of this encoder, which is raised when its
/// ids change, and the versions of the libraries that normalize, split and merge, as in Cargo.lock. It is
/// part of the key of every output that holds ids.
pub const ENCODER: &str = "encoder 1, tokenizers 0.23.2, onig 6.5.3, onig_sys 69.9.3, regex-syntax 0.8.12, \
                           spm_precompiled 0.1.4, unicode-normalization-alignments 0.1.12, \
                           unicode-segmentation 1.13.3, unicode_categories 0.1.1";

/// A tokenizer that threads can share.
pub struct Tokenizer {
    plain: tokenizers::Tokenizer,
    /// `None` if the library encodes whole texts.
    cuts: Option<Cuts>,
    vocab_size: usize,
    /// The ids that the file's post-processor puts before and after a text.
    around: [Vec<u32>; 2],
    /// Caches that no encoder uses at the moment. A new encoder takes one of them, so that it does not start
    /// empty.
    caches: Mutex<Vec<Cache>>,
}

impl Tokenizer {
    /// Loads a tokenizer from the bytes of a `tokenizer.json`. `name` stands for the file in error messages.
    ///
    /// # Errors
    /// It is not a tokenizer.json, its largest id is not below 2³¹ − 1, it may give a text different ids at
    /// different times, or its post-processor changes the text's own ids.
    pub fn from_json(json: &[u8], name: &str) -> Result<Self, TokenizerError> {
        let unusable = |message: String| TokenizerError::Unusable { name: name.to_owned(), message };
        if json.trim_ascii_start().first() != Some(&b'{') {
            let message = "it is not JSON; a tokenizer.model of SentencePiece has to be saved as a tokenizer.json first";
            return Err(unusable(message.into()));
        }
        // parsing some 100,000 merges takes a while, so the library and the cuts do it in parallel
        let (plain, cuts) = std::thread::scope(|scope| {
            let cuts = scope.spawn(|| serde_json::from_slice::<Value>(json).map(|file| Cuts::of(&file)));
            (tokenizers::Tokenizer::from_bytes(json), cuts.join().expect("reading JSON does not panic"))
        });
        let mut plain = plain.map_err(|e| unusable(e.to_string()))?;
        // truncation would lose text, and padding would add ids
        plain.with_truncation(None).map_err(|e| unusable(e.to_string()))?;
        plain.with_padding(None);
        let vocab_size = plain.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        if i32::try_from(vocab_size).is_err() {
            // packed files hold int32
            return Err(unusable(format!("its largest id is {}; ids have to be below 2³¹", vocab_size - 1)));
        }
        depends_on_the_text_alone(&plain).map_err(unusable)?;
        let around = around(&plain).map_err(unusable)?;
        let cuts = cuts
            .map_err(|e| unusable(e.to_string()))?
            // the library decides the ids of added tokens; if they differ from the file's, texts are not cut
            .filter(|cuts| cuts.added.iter().all(|(token, id)| plain.token_to_id(token) == Some(*id)));
        Ok(Self { plain, cuts, vocab_size, around, caches: Mutex::default() })
    }

    /// The largest id plus one, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The largest id plus one of the model's own vocabulary, without tokens that were added later, such as
    /// for padding or chats.
    pub fn own_vocab_size(&self) -> usize {
        self.plain.get_vocab(false).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// The ids that the file's post-processor puts before and after a text; nearly always one or none on each
    /// side.
    pub fn around(&self) -> &[Vec<u32>; 2] {
        &self.around
    }

    /// The id of a token, which is given as it is written in the file.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.plain.token_to_id(token)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.plain.id_to_token(id)
    }

    /// The added tokens with their ids, sorted by id.
    pub fn added(&self) -> Vec<(u32, AddedToken)> {
        added(&self.plain)
    }

    /// The token for text that has no other, if the model names one.
    pub fn unknown(&self) -> Option<String> {
        match self.plain.get_model() {
            ModelWrapper::BPE(model) => model.unk_token.clone(),
            ModelWrapper::WordPiece(model) => Some(model.unk_token.clone()),
            ModelWrapper::WordLevel(model) => Some(model.unk_token.clone()),
            // the library does not expose it
            ModelWrapper::Unigram(_) => None,
        }
    }

    /// Whether texts are cut into pieces before they are encoded.
    pub fn is_cut(&self) -> bool {
        self.cuts.is_some()
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.plain.decode(ids, false).map_err(|e| TokenizerError::Failed(e.to_string()))
    }

    /// The ids that Hugging Face's library gives, without special tokens: the reference for
    /// [`Encoder::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoded =
            self.plain.encode_fast(text, false).map_err(|e| TokenizerError::Failed(e.to_string()))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// An encoder for one thread. The next encoder takes over its cache of pieces when it is dropped.
    pub fn encoder(&self) -> Encoder<'_> {
        let cache = self.caches.lock().ok().and_then(|mut caches| caches.pop());
        Encoder {
            tokenizer: self,
            text: Vec::new(),
            cache: cache.unwrap_or_default(),
            merging: Merging::default(),
        }
    }
}

/// Added tokens, sorted by id.
fn added(plain: &tokenizers::Tokenizer) -> Vec<(u32, AddedToken)> {
    let mut added: Vec<_> = plain.get_added_tokens_decoder().into_iter().collect();
    added.sort_by_key(|(id, _)| *id);
    added
}

/// Refuses tokenizers that may give the same text different ids.
fn depends_on_the_text_alone(plain: &tokenizers::Tokenizer) -> Result<(), String> {
    if let ModelWrapper::BPE(model) = plain.get_model()
        && let Some(dropout) = model.dropout.filter(|dropout| *dropout > 0.0)
    {
        return Err(format!(
            "its model.dropout is {dropout}, with which a text has other ids each time; set it to null in a copy"
        ));
    }
    // if two added tokens are equal after normalization, the library's hashing decides which of them it finds
    let mut found: HashMap<String, String> = HashMap::new();
    for (_, AddedToken { content, .. }) in added(plain).into_iter().filter(|(_, token)| token.normalized) {
        let mut text = NormalizedString::from(content.as_str());
        if let Some(normalizer) = plain.get_normalizer() {
            normalizer.normalize(&mut text).map_err(|e| e.to_string())?;
        }
        if let Some(other) = found.insert(text.get().to_owned(), content.clone()) {
            return Err(format!(
                "its added tokens {other:?} and {content:?} are the same text once they are normalized, so which \
                 is found changes; set `normalized` to false in a copy, or take one out"
            ));
        }
    }
    Ok(())
}

/// The ids that a post-processor puts before and after a text.
fn around(plain: &tokenizers::Tokenizer) -> Result<[Vec<u32>; 2], String> {
    // a text of one id that no tokenizer has; a real text would not do, because this tokenizer may be unable
    // to spell any
    const TEXT: u32 = u32::MAX;
    let processed = |specials| {
        let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_owned(), (0, 1))], 0);
        let processed = plain.post_process(text, None, specials).map_err(|e| e.to_string())?;
        Ok::<_, String>(processed.get_ids().to_vec())
    };
    let whole = processed(true)?;
    let parts: Vec<&[u32]> = whole.split(|id| *id == TEXT).collect();
    let (&[before, after], true) = (parts.as_slice(), processed(false)? == [TEXT]) else {
        return Err("its post-processor changes the text's own ids".into());
    };
    match [before, after].concat().into_iter().find(|id| plain.id_to_token(*id).is_none()) {
        Some(id) => {
            Err(format!("its post-processor puts the id {id} around texts, which it has no token for"))
        }
        None => Ok([before, after].map(<[u32]>::to_vec)),
    }
}

/// Where a text may be cut, and which tokens are found in it before.
struct Cuts {
    /// Pairs of ASCII characters that a merge may join.
    ascii: Box<[bool; 128 * 128]>,
    /// All such pairs. It is asked if one of the characters is not ASCII.
    other: hashbrown::HashSet<(char, char)>,
    /// Added tokens with their ids. They are found in the raw text before anything else: the leftmost first,
    /// and of several that begin at the same place the longest.
    added: Vec<(String, u32)>,
    /// Finds the added tokens in a text.
    finder: AhoCorasick,
    merges: Merges,
}

/// The merges of a byte-pair encoding.
struct Merges {
    characters: HashMap<char, u32>,
    /// The ids of the 256 byte tokens, which spell the characters that have no id of their own.
    bytes: [u32; 256],
    /// For two adjacent ids: the rank of the merge that joins them, and the resulting id.
    pairs: HashMap<(u32, u32), (u32, u32)>,
}

/// The character that SentencePiece writes for a space.
const SPACE: char = '\u{2581}';

impl Cuts {
    /// `None` unless the file shows that cutting is exact: the pieces have the same ids as the whole text.
    fn of(file: &Value) -> Option<Self> {
        let model = &file["model"];
        let unset = |key: &str| matches!(&model[key], Value::Null | Value::Bool(false)) || model[key] == "";
        let is_bpe = model["type"] == "BPE"
            && model["byte_fallback"] == true
            && ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"]
                .into_iter()
                .all(unset);
        let prepend = serde_json::json!({ "type": "Prepend", "prepend": SPACE.to_string() });
        let replace = serde_json::json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE.to_string() });
        let normalizer = serde_json::json!({ "type": "Sequence", "normalizers": [prepend, replace] });
        if !is_bpe || !file["pre_tokenizer"].is_null() || file["normalizer"] != normalizer {
            return None;
        }
        let vocab = model["vocab"].as_object()?;
        // merges are looked up by id: two pieces with the same id could be joined although no merge has their
        // texts
        let ids: hashbrown::HashSet<_> = vocab.values().map(Value::as_u64).collect();
        if ids.len() != vocab.len() {
            return None;
        }
        // an unknown character is spelled in bytes; if a byte had no token, the character would fuse with its
        // neighbour
        let id = |token: &str| u32::try_from(vocab.get(token)?.as_u64()?).ok();
        let bytes: Option<Vec<u32>> = (0..256).map(|byte| id(&format!("<0x{byte:02X}>"))).collect();
        let merges = Merges {
            characters: vocab.keys().filter_map(|token| Some((only_char(token)?, id(token)?))).collect(),
            bytes: bytes?.try_into().ok()?,
            pairs: HashMap::new(),
        };
        let mut added = vec![];
        for token in file["added_tokens"].as_array()? {
            let flags = ["single_word", "lstrip", "rstrip", "normalized"];
            let content = token["content"].as_str()?;
            if content.is_empty() || flags.iter().any(|flag| token[*flag] != false) {
                return None;
            }
            added.push((content.to_owned(), u32::try_from(token["id"].as_u64()?).ok()?));
        }
        let contents = added.iter().map(|(content, _)| content);
        let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents).ok()?;
        let mut cuts =
            Cuts { ascii: Box::new([false; 128 * 128]), other: Default::default(), added, finder, merges };
        for (rank, merge) in (0..).zip(model["merges"].as_array()?) {
            let (left, right) = match merge {
                Value::Array(pair) => (pair.first()?.as_str()?, pair.get(1)?.as_str()?),
                Value::String(pair) => pair.split_once(' ')?,
                _ => return None,
            };
            // a merge of byte tokens could join two unknown characters, between which texts are cut
            if [left, right].iter().any(|side| side.len() == 6 && side.starts_with("<0x")) {
                return None;
            }
            cuts.join(left.chars().next_back()?, right.chars().next()?);
            cuts.merges.pairs.insert((id(left)?, id(right)?), (rank, id(&format!("{left}{right}"))?));
        }
        Some(cuts)
    }

    /// Records that a merge may join two characters. A space in the text counts as the character that
    /// replaces it.
    fn join(&mut self, left: char, right: char) {
        for left in [left].into_iter().chain((left == SPACE).then_some(' ')) {
            for right in [right].into_iter().chain((right == SPACE).then_some(' ')) {
                if left.is_ascii() && right.is_ascii() {
                    self.ascii[left as usize * 128 + right as usize] = true;
                }
                self.other.insert((left, right));
            }
        }
    }
}

/// The character of a token that consists of exactly one.
fn only_char(token: &str) -> Option<char> {
    let mut characters = token.chars();
    characters.next().filter(|_| characters.next().is_none())
}

/// A piece that is being merged.
#[derive(Default)]
struct Merging {
    ids: Vec<u32>,
    /// For each id but the last, the merge with the id after it: its rank and the resulting id.
    merges: Vec<(u32, u32)>,
}

/// Stands for no merge. Its rank is after all others.
const NO_MERGE: (u32, u32) = (u32::MAX, u32::MAX);

impl Merges {
    /// The ids of a piece. The possible merge of the lowest rank is made first, the leftmost of several,
    /// until none is left. The time is quadratic in the piece's length, but for pieces as short as real ones
    /// this is the fastest way.
    fn encode<'a>(&self, piece: &str, merging: &'a mut Merging) -> &'a [u32] {
        let Merging { ids, merges } = merging;
        ids.clear();
        for character in piece.chars().map(|c| if c == ' ' { SPACE } else { c }) {
            match self.characters.get(&character) {
                Some(id) => ids.push(*id),
                None => {
                    let mut spelled = [0; 4];
                    ids.extend(
                        character.encode_utf8(&mut spelled).bytes().map(|byte| self.bytes[byte as usize]),
                    );
                }
            }
        }
        let of = |left: u32, right: u32| self.pairs.get(&(left, right)).copied().unwrap_or(NO_MERGE);
        merges.clear();
        merges.extend(ids.windows(2).map(|pair| of(pair[0], pair[1])));
        while let Some((at, merge)) = merges.iter().copied().enumerate().min_by_key(|(_, merge)| merge.0)
            && merge != NO_MERGE
        {
            ids[at] = merge.1;
            ids.remove(at + 1);
            merges.remove(at);
            if at > 0 {
                merges[at - 1] = of(ids[at - 1], ids[at]);
            }
            if at < merges.len() {
                merges[at] = of(ids[at], ids[at + 1]);
            }
        }
        ids
    }
}

/// Encodes texts on one thread.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The text being encoded, after the space that the normalizer puts before it. Zeros behind it let 16
    /// bytes be read at any place.
    text: Vec<u8>,
    cache: Cache,
    merging: Merging,
}

impl Drop for Encoder<'_> {
    fn drop(&mut self) {
        if let Ok(mut caches) = self.tokenizer.caches.lock() {
            caches.push(std::mem::take(&mut self.cache));
        }
    }
}

/// The ids of pieces that were encoded before.
#[derive(Default)]
struct Cache {
    short: ShortPieces,
    /// Pieces that don't fit [`ShortPieces`].
    long: HashMap<Box<[u8]>, Box<[u32]>>,
}

/// Pieces of more bytes are not cached. The library merges them in time n log n in their length.
const LONG_PIECE: usize = 64;

/// How many pieces the cache holds that don't fit [`ShortPieces`]; they take at most 16 MB.
const LONG_PIECES: usize = 1 << 16;

impl Encoder<'_> {
    /// Appends the ids of a text, without special tokens.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let Some(cuts) = &self.tokenizer.cuts else {
            ids.extend_from_slice(&self.tokenizer.encode_plain(text)?);
            return Ok(());
        };
        let mut from = 0;
        for found in cuts.finder.find_iter(text) {
            self.encode_segment(cuts, &text[from..found.start()], ids)?;
            ids.push(cuts.added[found.pattern().as_usize()].1);
            from = found.end();
        }
        self.encode_segment(cuts, &text[from..], ids)
    }

    /// Encodes a part of a text that contains no added token.
    fn encode_segment(
        &mut self,
        cuts: &Cuts,
        segment: &str,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        if segment.is_empty() {
            return Ok(());
        }
        let mut text = std::mem::take(&mut self.text);
        text.clear();
        text.push(b' ');
        text.extend_from_slice(segment.as_bytes());
        let end = text.len();
        text.resize(end + 16, 0);

        let mut start = 0;
        let mut stops = [0; BATCH];
        let mut waiting = 0;
        let mut at = 1;
        while at < end {
            let (last, first) = (text[at - 1], text[at]);
            let joined = if last < 128 && first < 128 {
                cuts.ascii[last as usize * 128 + first as usize]
            } else if first & 0xC0 == 0x80 {
                true // inside a character
            } else {
                cuts.other.contains(&(char_before(&text, at), char_at(&text, at)))
            };
            if !joined {
                stops[waiting] = at;
                waiting += 1;
                if waiting == BATCH {
                    self.encode_pieces(cuts, &text, start, &stops, ids)?;
                    start = at;
                    waiting = 0;
                }
            }
            at += 1;
        }
        stops[waiting] = end;
        self.encode_pieces(cuts, &text, start, &stops[..=waiting], ids)?;
        self.text = text;
        Ok(())
    }

    /// Encodes adjacent pieces, each of which ends at one of `stops`, from the cache if possible. All cache
    /// slots are loaded before the first is compared, so that the memory accesses overlap.
    #[inline]
    fn encode_pieces(
        &mut self,
        cuts: &Cuts,
        text: &[u8],
        mut start: usize,
        stops: &[usize],
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let mut met = [(0, CacheSlot::default()); BATCH];
        let mut from = start;
        for (stop, (key, place)) in stops.iter().zip(&mut met) {
            *key = short_key(text, from, *stop);
            *place = self.cache.short.places[ShortPieces::place(*key)];
            from = *stop;
        }
        for (stop, (key, place)) in stops.iter().zip(met) {
            if key == 0 || !(place.append(key, ids) || self.cache.short.get(key, ids)) {
                self.encode_rare(cuts, &text[start..*stop], key, ids)?;
            }
            start = *stop;
        }
        Ok(())
    }

    /// Encodes a piece that the cache of short pieces does not have: it is long, has many ids, or is new.
    #[cold]
    fn encode_rare(
        &mut self,
        cuts: &Cuts,
        piece: &[u8],
        key: u128,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        if let Some(known) = self.cache.long.get(piece) {
            ids.extend_from_slice(known);
            return Ok(());
        }
        let text = std::str::from_utf8(piece).map_err(|e| TokenizerError::Failed(e.to_string()))?;
        if piece.len() > LONG_PIECE {
            let tokens = self.tokenizer.plain.get_model().tokenize(&text.replace(' ', "\u{2581}"));
            let tokens = tokens.map_err(|e| TokenizerError::Failed(e.to_string()))?;
            ids.extend(tokens.iter().map(|token| token.id));
            return Ok(());
        }
        let new = cuts.merges.encode(text, &mut self.merging);
        ids.extend_from_slice(new);
        if key == 0 || !self.cache.short.insert(key, new) {
            self.cache.remember(piece, new);
        }
        Ok(())
    }
}

impl Cache {
    fn remember(&mut self, piece: &[u8], ids: &[u32]) {
        if self.long.len() >= LONG_PIECES {
            self.long.clear();
        }
        self.long.insert(piece.into(), ids.into());
    }
}

fn char_at(text: &[u8], at: usize) -> char {
    let stop = (at + 1..at + 4).find(|i| text.get(*i).is_none_or(|b| b & 0xC0 != 0x80)).unwrap_or(at + 4);
    std::str::from_utf8(&text[at..stop]).ok().and_then(|c| c.chars().next()).unwrap_or('\0')
}

fn char_before(text: &[u8], at: usize) -> char {
    let start = (0..at).rev().find(|i| text[*i] & 0xC0 != 0x80).unwrap_or(0);
    char_at(text, start)
}

/// The most bytes of a short piece.
const SHORT_BYTES: usize = 16;

/// The most ids of a short piece.
const SHORT_IDS: usize = 3;

/// How many pieces are looked up in the cache at a time.
const BATCH: usize = 16;

/// The bytes of a short piece as a number, padded with zeros. It is 0 for a piece that is too long, or that
/// ends with a zero byte and would be mistaken for a shorter one.
#[inline]
fn short_key(text: &[u8], start: usize, stop: usize) -> u128 {
    let length = stop - start;
    if length > SHORT_BYTES || text[stop - 1] == 0 {
        return 0;
    }
    let bytes: [u8; 16] = text[start..start + 16].try_into().expect("16 bytes, the text is padded");
    u128::from_le_bytes(bytes) & (u128::MAX >> (128 - 8 * length as u32))
}

/// A short piece and its ids; the last number says how many ids there are. An empty slot has key 0. The
/// alignment keeps a slot within one cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct CacheSlot {
    key: u128,
    ids: [u32; SHORT_IDS + 1],
}

impl CacheSlot {
    /// Appends the ids; returns false if the slot holds another piece.
    #[inline]
    fn append(&self, key: u128, ids: &mut Vec<u32>) -> bool {
        let [first, second, third, count] = self.ids;
        // nearly always there is one id, and a call that copies three takes longer than this
        match count {
            _ if self.key != key => return false,
            1 => ids.push(first),
            2 => ids.extend([first, second]),
            _ => ids.extend([first, second, third]),
        }
        true
    }
}

/// The ids of short pieces: a hash table of fixed size (16 MiB), which is emptied when it is half full.
struct ShortPieces {
    places: Vec<CacheSlot>,
    used: usize,
}

impl Default for ShortPieces {
    fn default() -> Self {
        Self { places: vec![CacheSlot::default(); Self::SLOTS], used: 0 }
    }
}

impl ShortPieces {
    const SLOTS: usize = 1 << 19;

    #[inline]
    fn place(key: u128) -> usize {
        let folded = (key as u64) ^ ((key >> 64) as u64).rotate_left(32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (folded.wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 45) as usize
    }

    /// Appends the ids of a piece; returns false if it is not cached.
    fn get(&self, key: u128, ids: &mut Vec<u32>) -> bool {
        let mut place = Self::place(key);
        while self.places[place].key != 0 {
            if self.places[place].append(key, ids) {
                return true;
            }
            place = (place + 1) & (Self::SLOTS - 1);
        }
        false
    }

    /// Caches a piece's ids; returns false if there are none, or more than [`SHORT_IDS`].
    fn insert(&mut self, key: u128, ids: &[u32]) -> bool {
        if ids.is_empty() || ids.len() > SHORT_IDS {
            return false;
        }
        if self.used >= Self::SLOTS / 2 {
            self.places.fill(CacheSlot::default());
            self.used = 0;
        }
        let mut known = [0; SHORT_IDS + 1];
        known[..ids.len()].copy_from_slice(ids);
        known[SHORT_IDS] = ids.len() as u32;
        let mut place = Self::place(key);
        while self.places[place].key != 0 {
            place = (place + 1) & (Self::SLOTS - 1);
        }
        self.places[place] = CacheSlot { key, ids: known };
        self.used += 1;
        true
    }
}

/// Lines with words of more bytes are not trained on.
const LONGEST_TRAINED_WORD: usize = 1024;

/// Trains a byte-level BPE of `vocab` ids on texts and returns its `tokenizer.json`. BOS is `<s>`, which goes
/// before every text; EOS is `</s>`.
///
/// The result is the same for any order of the texts and any number of threads.
pub fn train<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocab: usize,
) -> Result<Vec<u8>, TokenizerError> {
    let failed = |e: tokenizers::Error| TokenizerError::NotTrained(e.to_string());
    let special = |token: &str| AddedToken::from(token.to_owned(), true).normalized(false);
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![special("<s>"), special("</s>")])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .max_token_length(Some(64))
        .build();
    let split = ByteLevel::new(false, true, true);
    let mut tokenizer = tokenizers::TokenizerBuilder::<
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::default()
    .with_model(ModelWrapper::BPE(Default::default()))
    .with_pre_tokenizer(Some(split.into()))
    .with_decoder(Some(split.into()))
    .build()
    .map_err(failed)?;
    // a word of a megabyte is data, not language, and the time to merge it is quadratic in its length
    let lines = texts
        .flat_map(|text| text.split_inclusive('\n'))
        .filter(|line| line.split_ascii_whitespace().all(|word| word.len() <= LONGEST_TRAINED_WORD));
    tokenizer.train(&mut tokenizers::models::TrainerWrapper::from(trainer), lines).map_err(failed)?;
    let mut json: Value = serde_json::from_str(&tokenizer.to_string(false).map_err(failed)?)
        .map_err(|e| TokenizerError::NotTrained(e.to_string()))?;
    let bos = serde_json::json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    let text = |name: &str| serde_json::json!({ "Sequence": { "id": name, "type_id": 0 } });
    json["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [bos, text("A")],
        "pair": [bos, text("A"), bos, text("B")],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } },
    });
    serde_json::to_vec(&json).map_err(|e| TokenizerError::NotTrained(e.to_string()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const SAMPLE: &str = "the cat sat on the mat; the other cat sat on that mat and then the hat. it is 2026, it is late — très tard.";

    /// An entry of `added_tokens`.
    pub(crate) fn added(id: u32, content: &str) -> Value {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        })
    }

    /// A tokenizer of LLaMA's kind: without pre-tokenizer, with spaces as `▁` and unknown characters as
    /// bytes.
    pub(crate) fn sentencepiece(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        vocab.extend((0..256).map(|b| format!("<0x{b:02X}>")));
        let mut characters: Vec<String> = SAMPLE.replace(' ', "▁").chars().map(String::from).collect();
        characters.sort();
        characters.dedup();
        vocab.extend(characters);
        let merges = [
            ("t", "h"),
            ("th", "e"),
            ("▁", "the"),
            ("a", "t"),
            ("▁", "c"),
            ("▁c", "at"),
            ("i", "s"),
            ("▁", "is"),
            ("▁", "▁"),
            ("▁▁", "▁▁"),
            ("a", "a"),
            ("aa", "aa"),
            ("0", "2"),
            ("2", "02"),
            ("▁", "—"),
            ("è", "s"),
            ("r", "ès"),
            (".", "\u{2581}"),
        ];
        vocab.extend(merges.iter().map(|(l, r)| format!("{l}{r}")));
        let ids: serde_json::Map<String, Value> =
            vocab.iter().enumerate().map(|(id, t)| (t.clone(), json!(id))).collect();
        let mut file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            ] },
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
            },
            "decoder": null,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": ids, "merges": merges.map(|(l, r)| json!([l, r])),
            },
        });
        change(&mut file);
        serde_json::to_vec(&file).unwrap()
    }

    fn load(json: &[u8]) -> Tokenizer {
        Tokenizer::from_json(json, "test").unwrap()
    }

    fn encode(encoder: &mut Encoder<'_>, text: &str) -> Vec<u32> {
        let mut ids = vec![];
        encoder.encode(text, &mut ids).unwrap();
        ids
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn cut_texts_have_the_ids_of_the_plain_encoder(
            texts in prop::collection::vec(
                prop::collection::vec(
                    prop_oneof![
                        "[the caisr.02▁—è]{0,12}", " {0,9}", "a{0,70}", "\\PC{0,6}", any::<String>(),
                        Just("<s>".to_owned()), Just("</s>".to_owned()), Just("<0x0A>".to_owned()), Just("\0".to_owned()), Just("the\0".to_owned()),
                    ],
                    0..12,
                ),
                1..6,
            ),
        ) {
            let tokenizer = load(&sentencepiece(|_| {}));
            prop_assert!(tokenizer.is_cut());
            let mut encoder = tokenizer.encoder();
            // each text is encoded twice, the second time from the cache
            for text in texts.iter().chain(&texts).map(|pieces| pieces.concat()) {
                prop_assert_eq!(encode(&mut encoder, &text), tokenizer.encode_plain(&text).unwrap(), "{:?}", text);
            }
        }
    }

    #[test]
    fn a_tokenizer_that_cutting_does_not_suit_takes_the_plain_path() {
        let changes: [(&str, fn(&mut Value)); 9] = [
            ("dropout", |f| f["model"]["dropout"] = json!(0.0)),
            ("no byte fallback", |f| f["model"]["byte_fallback"] = json!(false)),
            ("whole words first", |f| f["model"]["ignore_merges"] = json!(true)),
            ("lower case", |f| f["normalizer"]["normalizers"][0] = json!({ "type": "Lowercase" })),
            ("no normalizer", |f| f["normalizer"] = Value::Null),
            ("one id for two pieces", |f| f["model"]["vocab"]["th"] = f["model"]["vocab"]["the"].clone()),
            ("words", |f| f["pre_tokenizer"] = json!({ "type": "Whitespace" })),
            ("added tokens that take spaces", |f| f["added_tokens"][1]["rstrip"] = json!(true)),
            ("merges of bytes", |f| {
                f["model"]["vocab"]["<0xE2><0x82>"] = json!(999);
                f["model"]["merges"].as_array_mut().unwrap().push(json!(["<0xE2>", "<0x82>"]));
            }),
        ];
        for (what, change) in changes {
            let tokenizer = load(&sentencepiece(change));
            assert!(!tokenizer.is_cut(), "{what}");
            let text = "the cat <s> is ☃ on";
            let ids = encode(&mut tokenizer.encoder(), text);
            assert_eq!(ids, tokenizer.encode_plain(text).unwrap(), "{what}");
        }
    }

    /// Texts, some of which are prefixes, suffixes or middles of others, so that added tokens overlap.
    fn overlapping() -> impl Strategy<Value = String> {
        prop_oneof!["[<|ab>]{1,5}", "<extra_id_[0-9]{1,3}>", "[the ca▁è<]{1,6}"]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn added_tokens_are_found_where_the_library_finds_them(
            tokens in prop::collection::hash_set(overlapping(), 1..150),
            texts in prop::collection::vec(prop::collection::vec(prop_oneof![overlapping(), " {0,3}", "[the ca]{0,8}"], 0..30), 1..4),
            picked in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let tokens: Vec<&String> = tokens.iter().collect();
            let json = sentencepiece(|file| {
                let vocab = file["model"]["vocab"].clone();
                let id = |i: u32, token: &str| vocab[token].as_u64().map_or(5_000 + i, |id| id as u32);
                let list = (0..).zip(&tokens).map(|(i, token)| added(id(i, token), token));
                file["added_tokens"] = list.collect();
            });
            // the library gives new tokens the next free ids, so the file has to say the same
            let known: HashMap<String, u32> = load(&json).added().into_iter().map(|(id, token)| (token.content, id)).collect();
            let mut file: Value = serde_json::from_slice(&json).unwrap();
            for token in file["added_tokens"].as_array_mut().unwrap() {
                token["id"] = json!(known[token["content"].as_str().unwrap()]);
            }
            let tokenizer = load(&serde_json::to_vec(&file).unwrap());
            prop_assert!(tokenizer.is_cut());
            let mut encoder = tokenizer.encoder();
            let picked: String = picked.iter().map(|index| index.get(&tokens).as_str()).collect();
            for text in texts.into_iter().map(|pieces| pieces.concat()).chain([picked]) {
                prop_assert_eq!(encode(&mut encoder, &text), tokenizer.encode_plain(&text).unwrap(), "{:?}", text);
            }
        }
    }

    #[test]
    fn a_tokenizer_that_has_other_ids_for_the_same_text_the_next_time_is_refused() {
        let refused =
            |json: &[u8]| Tokenizer::from_json(json, "s3://b/tokenizer.json").err().unwrap().to_string();
        let dropout = refused(&sentencepiece(|f| f["model"]["dropout"] = json!(0.1)));
        assert_eq!(
            dropout,
            "s3://b/tokenizer.json is not a tokenizer.json that can be used: its model.dropout is 0.1, with which a text \
             has other ids each time; set it to null in a copy"
        );
        let alike = refused(&sentencepiece(|f| {
            f["normalizer"] = json!({ "type": "Lowercase" });
            let (mut one, mut other) = (added(500, "Day"), added(501, "DAY"));
            (one["normalized"], other["normalized"]) = (json!(true), json!(true));
            f["added_tokens"].as_array_mut().unwrap().extend([one, other]);
        }));
        assert!(
            alike.contains("its added tokens \"Day\" and \"DAY\" are the same text once they are normalized"),
            "{alike}"
        );
    }

    #[test]
    fn the_encoder_s_libraries_have_the_versions_of_the_lock_file() {
        let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock")).unwrap();
        for library in ENCODER.split(", ").skip(1) {
            let (name, version) = library.split_once(' ').unwrap();
            let locked: Vec<&str> = lock
                .split("[[package]]\n")
                .filter_map(|package| package.strip_prefix(&format!("name = \"{name}\"\nversion = \"")))
                .filter_map(|rest| rest.split('"').next())
                .collect();
            assert_eq!(locked, [version], "{name}: other ids may come of it; ENCODER has to say so");
        }
    }

    #[test]
    fn a_full_cache_is_emptied_and_the_ids_stay_right() {
        let tokenizer = load(&sentencepiece(|_| {}));
        let mut encoder = tokenizer.encoder();
        for i in 0..300_000u32 {
            // every piece is new; some are short, some long
            encode(
                &mut encoder,
                &format!(
                    "a{}a{}",
                    char::from_u32(0x4E00 + i % 20_000).unwrap(),
                    "☃".repeat((i / 20_000) as usize)
                ),
            );
        }
        assert!(
            encoder.cache.short.used <= ShortPieces::SLOTS / 2 && encoder.cache.long.len() <= LONG_PIECES
        );
        assert_eq!(encode(&mut encoder, SAMPLE), tokenizer.encode_plain(SAMPLE).unwrap());
    }

    #[test]
    fn a_text_of_nothing_but_added_tokens_takes_linear_time() {
        let tokenizer = load(&sentencepiece(|_| {}));
        let started = std::time::Instant::now();
        let ids = encode(&mut tokenizer.encoder(), &"<s>".repeat(1 << 20));
        assert_eq!((ids.len(), ids[0]), (1 << 20, 1));
        assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    }

    #[test]
    fn what_a_post_processor_puts_around_a_text_is_known_though_no_text_can_be_spelled() {
        let piece = |name: &str| json!({ "SpecialToken": { "id": name, "type_id": 0 } });
        let text = || json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let template = |single: Value| {
            let token =
                |name: &str, id: u32| (name.to_owned(), json!({ "id": name, "ids": [id], "tokens": [name] }));
            let known = [token("<s>", 1), token("</s>", 2), token("<lost>", 7_000)];
            json!({
                "type": "TemplateProcessing", "single": single, "pair": [text(), { "Sequence": { "id": "B", "type_id": 0 } }],
                "special_tokens": serde_json::Map::from_iter(known),
            })
        };
        let around = |file: &dyn Fn(&mut Value)| {
            Tokenizer::from_json(&sentencepiece(file), "test").map(|tokenizer| tokenizer.around().clone())
        };
        // a model whose unknown token is its BOS, so that a text has the same id as the BOS
        let bare =
            json!({ "type": "WordLevel", "vocab": { "<unk>": 0, "<s>": 1, "</s>": 2 }, "unk_token": "<s>" });
        for model in [None, Some(bare)] {
            for (single, want) in [
                (json!([piece("<s>"), text()]), [vec![1], vec![]]),
                (json!([piece("<s>"), text(), piece("</s>")]), [vec![1], vec![2]]),
                (json!([piece("</s>"), piece("<s>"), text()]), [vec![2, 1], vec![]]),
                (json!([text()]), [vec![], vec![]]),
            ] {
                let file = |file: &mut Value| {
                    file["post_processor"] = template(single.clone());
                    if let Some(model) = &model {
                        file["model"] = model.clone();
                    }
                };
                assert_eq!(around(&file).unwrap(), want, "{single}");
            }
        }
        assert_eq!(
            around(&|file| file["post_processor"] = Value::Null).unwrap(),
            [const { Vec::<u32>::new() }; 2]
        );
        for (single, message) in [
            (json!([text(), text()]), "its post-processor changes the text's own ids"),
            (json!([piece("<s>")]), "its post-processor changes the text's own ids"),
            (json!([piece("<lost>"), text()]), "its post-processor puts the id 7000 around texts"),
        ] {
            let error =
                around(&|file| file["post_processor"] = template(single.clone())).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn what_is_no_tokenizer_is_refused_by_name() {
        let error = Tokenizer::from_json(b"{}", "s3://b/tokenizer.json").err().unwrap().to_string();
        assert!(error.starts_with("s3://b/tokenizer.json is not a tokenizer.json"), "{error}");
    }

    #[test]
    fn a_tokenizer_is_trained_the_same_from_texts_in_any_order() {
        let texts: Vec<String> =
            (0..400).map(|i| format!("{SAMPLE} fn main() {{ let x{i} = {}; }}", i * 37 % 101)).collect();
        let forwards = train(texts.iter().map(String::as_str), 400).unwrap();
        let backwards = train(texts.iter().rev().map(String::as_str), 400).unwrap();
        assert_eq!(forwards, backwards);
        let tokenizer = load(&forwards);
        assert_eq!((tokenizer.vocab_size(), tokenizer.around()), (400, &[vec![0], vec![]]));
        let ids = tokenizer.encode_plain(SAMPLE).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), SAMPLE);
        assert!(ids.len() < SAMPLE.len() / 2);
    }
}
