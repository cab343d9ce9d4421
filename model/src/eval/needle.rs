//! Needle in a haystack, with the prompts and scores of the paper's authors (§5.1, Figure 1): a sentence about San Francisco
//! is inserted into essays, at a depth of a context of a given length, and the model is asked for it.
//!
//! The authors' code tokenizes and decodes the context, which leaves the tokenizer's BOS in the middle of the prompt. Here the
//! only BOS is at the start.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::conf::NeedleConf;
use super::{EvalModel, TextTokenizer};
use crate::decoder::common_prefix_len;
use crate::{Error, Result};

/// Tokens of a length that are reserved for the prompt around the context, and for the reply.
const BUFFER: usize = 200;

/// The most tokens of a reply.
const MAX_REPLY_TOKENS: usize = 50;

/// The result of a length and depth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub length: usize,
    pub depth: f64,
    pub prompt_tokens: usize,
    /// How many of the prompt's tokens came from the cache.
    #[serde(default)]
    pub reused: usize,
    /// The BLAKE3 digest of the prompt's text.
    pub prompt: String,
    pub reply: String,
    /// From 0 to the answer's share of distinct words.
    pub score: f64,
    #[serde(default)]
    pub seconds: f64,
}

/// A tokenized haystack, from which prompts are made.
pub struct Haystack<'a> {
    settings: &'a NeedleConf,
    text: &'a TextTokenizer,
    /// The prompt before and after the context.
    template: (String, String),
    /// As many ids as the longest length.
    essays: Vec<i32>,
    needle: Vec<i32>,
    /// The prompt without a needle.
    plain: Vec<i32>,
    /// Ids that end a sentence.
    periods: BTreeSet<i32>,
}

impl<'a> Haystack<'a> {
    /// Tokenizes essays, and repeats them if they are too short.
    ///
    /// # Errors
    /// There are no essays, or a setting is impossible.
    pub fn new(settings: &'a NeedleConf, text: &'a TextTokenizer, essays: &str) -> Result<Self> {
        let needle = text.ids(&settings.needle, false)?;
        let longest = settings.lengths.iter().copied().max().unwrap_or(0);
        if let Some(short) = settings.lengths.iter().find(|length| **length < BUFFER + needle.len() + 1) {
            return Err(Error::Conf(format!(
                "a needle of {} tokens and the prompt around it need more than the {short} tokens of a length",
                needle.len()
            )));
        }
        if let Some(depth) = settings.depths.iter().find(|depth| !(0.0..=100.0).contains(*depth)) {
            return Err(Error::Conf(format!("depth {depth} is not within 0 to 100 percent")));
        }
        let Some((before, after)) = settings.prompt.split_once("{context}") else {
            return Err(Error::Conf("the needle's prompt has no {context}".into()));
        };
        let asked = |text: &str| text.replace("{question}", &settings.question);
        let template = (asked(before), asked(after));
        let once = text.ids(essays, false)?;
        if once.is_empty() {
            return Err(Error::Conf("the haystack is empty".into()));
        }
        let essays: Vec<i32> = once.iter().copied().cycle().take(longest).collect();
        // The text of a token is known only when it is decoded.
        let mut periods = BTreeSet::new();
        for id in once.iter().collect::<BTreeSet<_>>() {
            if text.text(&[*id])?.trim() == "." {
                periods.insert(*id);
            }
        }
        let mut new = Self { settings, text, template, essays, needle, plain: vec![], periods };
        new.plain = text.ids(&new.fill_template(&text.text(&new.essays)?), true)?;
        Ok(new)
    }

    fn fill_template(&self, context: &str) -> String {
        let (before, after) = &self.template;
        format!("{before}{context}{after}")
    }

    /// The prompt of a length with the needle at a depth.
    fn prompt(&self, length: usize, depth: f64) -> Result<String> {
        let context = &self.essays[..length - BUFFER - self.needle.len()];
        let mut at = (context.len() as f64 * depth / 100.0) as usize;
        if depth < 100.0 {
            // Go back to the end of a sentence, or to the start.
            while at > 0 && !self.periods.contains(&context[at - 1]) {
                at -= 1;
            }
        }
        let all = [&context[..at], &self.needle, &context[at..]].concat();
        Ok(self.fill_template(&self.text.text(&all)?))
    }

    /// Asks for the needle at a depth of a length.
    pub fn ask(&self, subject: &EvalModel, length: usize, depth: f64) -> Result<Case> {
        let started = std::time::Instant::now();
        let prompt = self.prompt(length, depth)?;
        let ids = self.text.ids(&prompt, true)?;
        // All prompts are equal up to the needle.
        let reply = subject.reply(&ids, common_prefix_len(&ids, &self.plain), MAX_REPLY_TOKENS)?;
        let text = self.text.text(&reply.ids)?;
        Ok(Case {
            length,
            depth,
            prompt_tokens: ids.len(),
            reused: reply.reused,
            prompt: blake3::hash(prompt.as_bytes()).to_hex().to_string(),
            score: score(&text, &self.settings.answer),
            reply: text.trim().to_owned(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// The authors' score of Figure 1: the share of the answer's words, lower-cased and split at white space, that the reply
/// contains. As in their code, a repeated word of the answer counts once in the numerator and each time in the denominator.
pub fn score(reply: &str, answer: &str) -> f64 {
    let (reply, answer) = (reply.to_lowercase(), answer.to_lowercase());
    let wanted: Vec<&str> = answer.split_whitespace().collect();
    let found: BTreeSet<&str> = reply.split_whitespace().collect();
    let both = wanted.iter().collect::<BTreeSet<_>>().into_iter().filter(|word| found.contains(**word));
    both.count() as f64 / wanted.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::conf::{ANSWER, PROMPT};
    use crate::eval::tests::words;

    /// The expected scores are those of the authors' visualize.py.
    #[test]
    fn the_score_is_the_authors() {
        for (reply, words) in [
            ("Eat a sandwich and sit in Dolores Park on a sunny day.", 11),
            ("eat a sandwich and sit in Dolores Park on a sunny day. eat a sandwich", 11),
            ("Eat a sandwich and sit in Dolores Park on a sunny day", 10),
            ("The best thing to do in San Francisco is to go for a walk.", 2),
            ("", 0),
        ] {
            assert_eq!(score(reply, ANSWER), f64::from(words) / 12.0, "{reply}");
        }
    }

    const WORDS: &str =
        "The quick fox jumps lazy dogs was over . needle here is it This a very long story book Answer";

    fn settings(lengths: &[usize]) -> NeedleConf {
        NeedleConf {
            haystack: String::new(),
            lengths: lengths.to_vec(),
            depths: vec![0.0, 50.0, 100.0],
            prompt: PROMPT.into(),
            needle: "needle here is it .".into(),
            question: "was it here ?".into(),
            answer: "it .".into(),
        }
    }

    #[test]
    fn the_needle_stands_after_the_end_of_a_sentence_at_its_depth() {
        let text = words(WORDS);
        let essays = "The quick fox jumps . The lazy dogs was over . ".repeat(3);
        let settings = settings(&[230]);
        let haystack = Haystack::new(&settings, &text, &essays).unwrap();
        let at = |depth| {
            let prompt = haystack.prompt(230, depth).unwrap();
            let context = prompt.split("<book> ").nth(1).unwrap().split(" </book>").next().unwrap();
            let words: Vec<&str> = context.split(' ').collect();
            // The context and the needle have 30 ids: 230 less the 200 that are reserved.
            assert_eq!(words.len(), 30, "{context}");
            words.iter().position(|word| *word == "needle").unwrap()
        };
        // Half of 25 words is 12, and the previous sentence ends at 11. At 100 percent the needle is last in any case.
        assert_eq!([0.0, 50.0, 99.0, 100.0].map(at), [0, 11, 22, 25]);
    }

    #[test]
    fn a_prompt_of_ones_own_has_the_context_and_the_question_in_their_places() {
        let text = words(WORDS);
        let essays = "The quick fox {question} . ".repeat(9);
        let own = NeedleConf { prompt: "{question} < {context} > {question}".into(), ..settings(&[230]) };
        let prompt = Haystack::new(&own, &text, &essays).unwrap().prompt(230, 0.0).unwrap();
        assert!(prompt.starts_with("was it here ? < needle here is it . The quick fox"), "{prompt}");
        assert!(prompt.ends_with("> was it here ?"), "{prompt}");
    }

    #[test]
    fn lengths_and_depths_that_can_not_be_are_refused() {
        let text = words(WORDS);
        let refused = |settings: NeedleConf, essays: &str| {
            Haystack::new(&settings, &text, essays).err().unwrap().to_string()
        };
        assert!(refused(settings(&[230, 204]), "The .").contains("more than the 204 tokens"));
        assert!(refused(settings(&[230]), "").contains("the haystack is empty"));
        let aimless = NeedleConf { prompt: "What is {question}?".into(), ..settings(&[230]) };
        assert!(refused(aimless, "The .").contains("has no {context}"));
        let deep = NeedleConf { depths: vec![101.0], ..settings(&[230]) };
        assert!(refused(deep, "The .").contains("depth 101"));
    }
}
