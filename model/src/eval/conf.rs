//! The conf's `[eval]` table.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::retrieval::Task;
use crate::amount::Count;
use crate::conf::Precision;
use crate::device::DeviceName;
use crate::{Error, Result};

/// The authors' needle, question and answer.
pub const NEEDLE: &str =
    "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n";
pub const QUESTION: &str = "What is the best thing to do in San Francisco?";
pub const ANSWER: &str = "eat a sandwich and sit in Dolores Park on a sunny day.";

/// The authors' prompt for a base model.
pub const PROMPT: &str = "<|im_start|> This is a very long story book: <book> {context} </book>.\n Based on the content of the book, Question: {question}\nAnswer:";

/// The evaluations that a run ends with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalConf {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needle: Option<NeedleConf>,
    /// Whether the loss of the run's held-out documents is computed.
    #[serde(default)]
    pub loss: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retrieval: Option<RetrievalConf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bookqa: Option<BookqaConf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choices: Option<ChoicesConf>,
    /// The devices. By default, those of `[train]`, and `["flex"]` without that table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<String>>,
    /// How many ranks share a text. By default, one for each device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// The type of number that matrices are multiplied in, and that keys and values are kept in.
    #[serde(default)]
    pub precision: Precision,
}

/// Hides a sentence in long texts, and asks for it: the paper's needle in a haystack.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NeedleConf {
    /// The texts that are put one after the other: a file, a folder or a glob.
    pub haystack: String,
    /// How long the texts are. By default, the paper's forty lengths from 1,000 to 128,000 tokens.
    #[serde(default = "paper_lengths", deserialize_with = "counts")]
    #[schemars(with = "Vec<Count>")]
    pub lengths: Vec<usize>,
    /// Where in the text the needle is, in percent. By default, the paper's ten depths from 0 to 100.
    #[serde(default = "paper_depths")]
    pub depths: Vec<f64>,
    /// What the model is asked, with `{context}` and `{question}` in it. By default, the paper's prompt. A chat model answers
    /// in its own template only.
    #[serde(default = "prompt")]
    pub prompt: String,
    /// The sentence that is hidden. By default, the paper's.
    #[serde(default = "needle")]
    pub needle: String,
    /// The question. By default, the paper's.
    #[serde(default = "question")]
    pub question: String,
    /// The right answer. By default, the paper's.
    #[serde(default = "answer")]
    pub answer: String,
}

/// Asks for needles of several kinds, for variables and for words, and scores the answers as RULER does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetrievalConf {
    /// The texts that are put one after the other: a file, a folder or a glob.
    pub haystack: String,
    /// How long the texts are, with the reply. By default, RULER's lengths from 4,096 to 131,072 tokens.
    #[serde(default = "ruler_lengths", deserialize_with = "counts")]
    #[schemars(with = "Vec<Count>")]
    pub lengths: Vec<usize>,
    /// What is asked. By default, all of it.
    #[serde(default = "all_tasks")]
    pub tasks: Vec<Task>,
    /// How many questions are asked for each task and length.
    #[serde(default = "ten")]
    pub samples: usize,
    /// The seed of the questions.
    #[serde(default)]
    pub seed: u64,
}

/// Asks questions about whole books, and scores the answers with F1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BookqaConf {
    /// The questions and books: JSONL in InfiniteBench's format, `longbook_qa_eng.jsonl`.
    pub file: String,
    /// How long the prompts are, with the reply. A longer book loses its middle. The default is the paper's 128K.
    #[serde(default = "paper_longest", deserialize_with = "one_count")]
    #[schemars(with = "Count")]
    pub length: usize,
}

/// Asks questions with choices, as MMLU does: is the model still good at short texts?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChoicesConf {
    /// The questions: CSV in MMLU's format, `SUBJECT_test.csv`.
    pub file: String,
    /// Questions of the same format that stand answered before each question, `SUBJECT_dev.csv`. By default, there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub examples: Option<String>,
    /// How many examples stand before each question. The default is MMLU's.
    #[serde(default = "five")]
    pub shots: usize,
    /// The subject that the prompt names.
    #[serde(default)]
    pub subject: String,
}

/// numpy's `round(linspace(1000, 128000, 40))`, as in the authors' script.
fn paper_lengths() -> Vec<usize> {
    (0..40).map(|i| (1000.0 + 127_000.0 / 39.0 * f64::from(i)).round_ties_even() as usize).collect()
}

/// numpy's `round(linspace(0, 100, 10))`.
fn paper_depths() -> Vec<f64> {
    (0..10).map(|i| (100.0 / 9.0 * f64::from(i)).round_ties_even()).collect()
}

fn ruler_lengths() -> Vec<usize> {
    (12..=17).map(|power| 1 << power).collect()
}

fn paper_longest() -> usize {
    1 << 17
}

fn all_tasks() -> Vec<Task> {
    Task::ALL.to_vec()
}

fn ten() -> usize {
    10
}

fn five() -> usize {
    5
}

fn prompt() -> String {
    PROMPT.to_owned()
}

fn needle() -> String {
    NEEDLE.to_owned()
}

fn question() -> String {
    QUESTION.to_owned()
}

fn answer() -> String {
    ANSWER.to_owned()
}

fn counts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<usize>, D::Error> {
    let counts = Vec::<Count>::deserialize(from)?.into_iter();
    Ok(counts.map(|Count(tokens)| tokens as usize).collect())
}

fn one_count<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    Count::deserialize(from).map(|Count(tokens)| tokens as usize)
}

/// An evaluation and its settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "evaluation", rename_all = "lowercase")]
pub enum Evaluation {
    Needle(NeedleConf),
    Loss,
    Retrieval(RetrievalConf),
    Bookqa(BookqaConf),
    Choices(ChoicesConf),
}

impl Evaluation {
    pub fn name(&self) -> &'static str {
        match self {
            Evaluation::Needle(_) => "needle",
            Evaluation::Loss => "loss",
            Evaluation::Retrieval(_) => "retrieval",
            Evaluation::Bookqa(_) => "bookqa",
            Evaluation::Choices(_) => "choices",
        }
    }

    /// The URLs that it reads, each with its key in the conf.
    pub fn urls(&mut self) -> Vec<(&'static str, &mut String)> {
        match self {
            Evaluation::Needle(conf) => vec![("haystack", &mut conf.haystack)],
            Evaluation::Loss => vec![],
            Evaluation::Retrieval(conf) => vec![("haystack", &mut conf.haystack)],
            Evaluation::Bookqa(conf) => vec![("file", &mut conf.file)],
            Evaluation::Choices(conf) => {
                let examples = conf.examples.as_mut().map(|examples| ("examples", examples));
                [("file", &mut conf.file)].into_iter().chain(examples).collect()
            }
        }
    }
}

impl EvalConf {
    /// Checks the table, before anything is computed.
    pub fn check(&self) -> Result<()> {
        let wrong = |message: &str| Err(Error::Conf(format!("eval.{message}")));
        if let Some(needle) = &self.needle
            && (needle.lengths.is_empty() || needle.depths.is_empty())
        {
            return wrong("needle: `lengths` and `depths` need at least one each");
        }
        if let Some(retrieval) = &self.retrieval
            && (retrieval.lengths.is_empty() || retrieval.tasks.is_empty() || retrieval.samples == 0)
        {
            return wrong("retrieval: `lengths`, `tasks` and `samples` need at least one each");
        }
        for name in self.devices.iter().flatten() {
            DeviceName::parse(name)?;
        }
        let devices = self.devices.as_ref().map_or(1, Vec::len);
        if self.ranks == Some(0) || devices > 1 && self.ranks.is_some_and(|ranks| ranks != devices) {
            return wrong("ranks: several devices have one rank each; only a single device is shared");
        }
        Ok(())
    }

    /// The evaluations in the order in which they run, the cheapest first.
    pub fn evaluations(&self) -> Vec<Evaluation> {
        let all = [
            self.loss.then_some(Evaluation::Loss),
            self.choices.clone().map(Evaluation::Choices),
            self.needle.clone().map(Evaluation::Needle),
            self.retrieval.clone().map(Evaluation::Retrieval),
            self.bookqa.clone().map(Evaluation::Bookqa),
        ];
        all.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_defaults_are_the_papers() {
        let conf: EvalConf =
            serde_json::from_value(json!({ "needle": { "haystack": "essays" }, "loss": true })).unwrap();
        let needle = conf.needle.clone().unwrap();
        assert_eq!((needle.lengths.len(), needle.depths.len()), (40, 10));
        assert_eq!((needle.lengths[0], needle.lengths[1], needle.lengths[39]), (1000, 4256, 128_000));
        assert_eq!(needle.depths, [0.0, 11.0, 22.0, 33.0, 44.0, 56.0, 67.0, 78.0, 89.0, 100.0]);
        let names: Vec<_> = conf.evaluations().iter().map(Evaluation::name).collect();
        assert_eq!(names, ["loss", "needle"]);
        conf.check().unwrap();
    }

    #[test]
    fn a_table_that_makes_no_sense_says_why() {
        for (conf, message) in [
            (json!({ "needle": { "haystack": "a", "lengths": [] } }), "eval.needle: `lengths`"),
            (json!({ "retrieval": { "haystack": "a", "samples": 0 } }), "eval.retrieval: `lengths`"),
            (json!({ "devices": ["gpu"] }), "there is no device `gpu`"),
        ] {
            let conf: EvalConf = serde_json::from_value(conf).unwrap();
            let error = conf.check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let lengths = json!({ "needle": { "haystack": "a", "lengths": ["8K", 500, "x"] } });
        let error = serde_json::from_value::<EvalConf>(lengths).unwrap_err().to_string();
        assert!(error.contains("\"x\" is not a number"), "{error}");
    }
}
