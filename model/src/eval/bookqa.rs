//! Questions about whole books, from a file in InfiniteBench's format (paper §5): each line is a JSON object with `context`,
//! `input` and a list `answer`. A book that is too long loses its middle. The score is the best F1 of any answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{EvalModel, InputFile, TextTokenizer};
use crate::{Error, Result};

/// The most tokens of a reply, as in the authors' evaluation.
const MAX_REPLY_TOKENS: usize = 40;

/// A question about a book.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    pub context: String,
    pub question: String,
    pub answers: Vec<String>,
}

/// A question's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// Its line in the file, counted from 1.
    pub line: usize,
    pub prompt_tokens: usize,
    /// How many tokens of the prompt were cut.
    pub cut: usize,
    pub reply: String,
    pub answers: Vec<String>,
    pub f1: f64,
    #[serde(default)]
    pub seconds: f64,
}

/// The questions of a file, each with its line number.
///
/// # Errors
/// The error names the file and line of a malformed question.
pub fn questions(InputFile { name, text }: &InputFile) -> Result<Vec<(usize, Question)>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            Ok((i + 1, question(line).map_err(|e| Error::Conf(format!("{name}, line {}: {e}", i + 1)))?))
        })
        .collect()
}

fn question(line: &str) -> Result<Question, String> {
    let row: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let text =
        |key: &str| row[key].as_str().map(str::to_owned).ok_or_else(|| format!("there is no text `{key}`"));
    let answers: Vec<String> = match &row["answer"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(several) => several.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => vec![],
    };
    if answers.is_empty() {
        return Err("`answer` is not a text or a list of texts".into());
    }
    Ok(Question { context: text("context")?, question: text("input")?, answers })
}

/// Asks a question in at most `length` tokens, including the reply.
pub fn ask(
    subject: &EvalModel,
    text: &TextTokenizer,
    line: usize,
    question: &Question,
    length: usize,
) -> Result<Case> {
    let started = std::time::Instant::now();
    // The authors' prompt for a base model.
    let prompt = format!(
        "<|im_start|>Read the book below and answer a question.\n\n{}\n\nQuestion: {}\n\nAnswer:",
        question.context, question.question
    );
    let (ids, cut) = truncate_middle(text.ids(&prompt, true)?, length.saturating_sub(MAX_REPLY_TOKENS));
    let reply = text.text(&subject.reply(&ids, 0, MAX_REPLY_TOKENS)?.ids)?;
    Ok(Case {
        line,
        prompt_tokens: ids.len(),
        cut,
        f1: question.answers.iter().map(|answer| f1(&reply, answer)).fold(0.0, f64::max),
        reply: reply.trim().to_owned(),
        answers: question.answers.clone(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Removes the middle of more than `max_tokens` ids. Returns the rest, and how many ids were removed.
fn truncate_middle(ids: Vec<i32>, max_tokens: usize) -> (Vec<i32>, usize) {
    if ids.len() <= max_tokens {
        return (ids, 0);
    }
    let (first, last) = (max_tokens / 2, max_tokens - max_tokens / 2);
    ([&ids[..first], &ids[ids.len() - last..]].concat(), ids.len() - max_tokens)
}

/// The F1 of the words of a reply and an answer, as in SQuAD and InfiniteBench: lower-cased, without punctuation and
/// articles.
pub fn f1(reply: &str, answer: &str) -> f64 {
    let (reply, answer) = (normalized(reply), normalized(answer));
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    answer.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut same = 0;
    for word in &reply {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    // 2 p r / (p + r)
    if same == 0 { 0.0 } else { 2.0 * f64::from(same) / (reply.len() + answer.len()) as f64 }
}

fn normalized(text: &str) -> Vec<String> {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    kept.split_whitespace().filter(|word| !["a", "an", "the"].contains(word)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_is_that_of_words_without_case_articles_and_punctuation() {
        for (reply, answer, want) in [
            ("The Old Man.", "old man", 1.0),
            ("an old, old man", "old man", 4.0 / 5.0),
            ("He was an old man of the sea", "old man", 4.0 / 8.0),
            ("nobody", "old man", 0.0),
            ("", "old man", 0.0),
            ("man man", "man", 2.0 / 3.0),
        ] {
            assert_eq!(f1(reply, answer), want, "{reply}");
        }
    }

    #[test]
    fn a_book_that_is_too_long_loses_its_middle() {
        assert_eq!(truncate_middle((0..10).collect(), 5), (vec![0, 1, 7, 8, 9], 5));
        assert_eq!(truncate_middle((0..10).collect(), 10).1, 0);
    }

    #[test]
    fn a_line_that_is_no_question_is_named() {
        let good = r#"{"id": 0, "context": "c", "input": "q", "answer": ["a", "b"], "options": []}"#;
        let all = questions(&InputFile::new("q.jsonl", &format!("{good}\n\n{good}\n"))).unwrap();
        assert_eq!(all.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(all[0].1.answers, ["a", "b"]);
        for (line, message) in [
            ("{", "line 2: EOF"),
            (r#"{"context": "c", "answer": "a"}"#, "line 2: there is no text `input`"),
            (r#"{"context": "c", "input": "q", "answer": []}"#, "line 2: `answer` is not a text or a list"),
        ] {
            let error =
                questions(&InputFile::new("q.jsonl", &format!("{good}\n{line}"))).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
