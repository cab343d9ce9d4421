//! Multiple-choice questions, which show whether a model keeps its short-context knowledge (paper §5, MMLU). The model's
//! choice is the one with the likeliest letter. Files have MMLU's format: CSV records `question,A,B,C,D,answer`.

use serde::{Deserialize, Serialize};

use super::{EvalModel, InputFile, TextTokenizer};
use crate::{Error, Result};

/// A question, its choices, and the index of the right one.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    pub question: String,
    pub choices: Vec<String>,
    pub answer: usize,
}

/// A question's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// Its number in the file, counted from 1.
    pub number: usize,
    pub prompt_tokens: usize,
    /// The log-likelihood of each choice's letter.
    pub likelihoods: Vec<f64>,
    pub chosen: usize,
    pub answer: usize,
    #[serde(default)]
    pub seconds: f64,
}

/// The questions of a file.
///
/// # Errors
/// The error names the file and line of a malformed question.
pub fn questions(InputFile { name, text }: &InputFile) -> Result<Vec<Question>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut all = vec![];
    for record in reader.records() {
        let record = record.map_err(|e| Error::Conf(format!("{name}: {e}")))?;
        let line = record.position().map_or(0, csv::Position::line);
        let wrong = |what: String| Error::Conf(format!("{name}, line {line}: {what}"));
        let fields: Vec<String> = record.iter().map(str::to_owned).collect();
        let [question, choices @ .., answer] = &fields[..] else {
            return Err(wrong("a line needs a question, choices and an answer".into()));
        };
        let letter = answer.trim().bytes().next().filter(|_| answer.trim().len() == 1);
        let index = letter.map(|letter| usize::from(letter.wrapping_sub(b'A')));
        let Some(right) = index.filter(|index| *index < choices.len()) else {
            let n = choices.len();
            return Err(wrong(format!("the answer `{answer}` is not the letter of one of {n} choices")));
        };
        all.push(Question { question: question.clone(), choices: choices.to_vec(), answer: right });
    }
    Ok(all)
}

fn letter(i: usize) -> char {
    char::from(b'A' + i as u8)
}

impl Question {
    fn text(&self) -> String {
        let choices = self.choices.iter().enumerate();
        let choices: String = choices.map(|(i, choice)| format!("{}. {choice}\n", letter(i))).collect();
        format!("{}\n{choices}Answer:", self.question)
    }
}

/// The prompt of a question, after few-shot examples.
fn prompt(subject: &str, examples: &[Question], question: &Question) -> String {
    let answered = examples.iter().map(|q| format!("{} {}\n\n", q.text(), letter(q.answer)));
    let subject = if subject.is_empty() { String::new() } else { format!(" about {subject}") };
    format!(
        "The following are multiple choice questions (with answers){subject}.\n\n{}{}",
        answered.collect::<String>(),
        question.text()
    )
}

/// Asks a question.
pub fn ask(
    model: &EvalModel,
    text: &TextTokenizer,
    subject: &str,
    examples: &[Question],
    number: usize,
    question: &Question,
) -> Result<Case> {
    let started = std::time::Instant::now();
    let prompt = prompt(subject, examples, question);
    let mut ids = text.ids(&prompt, true)?;
    // Tokenize letters together with the prompt, because alone they may have other tokens.
    let answered = |i| text.ids(&format!("{prompt} {}", letter(i)), true);
    let answered = (0..question.choices.len()).map(answered).collect::<Result<Vec<_>>>()?;
    let common = |all: &Vec<i32>| all.iter().zip(&ids).take_while(|(a, b)| a == b).count();
    ids.truncate(answered.iter().map(common).min().unwrap_or(0));
    let letters: Vec<Vec<i32>> = answered.iter().map(|all| all[ids.len()..].to_vec()).collect();
    let likelihoods = model.likelihoods(&ids, &letters)?;
    let best = |best: usize, i: usize| if likelihoods[i] > likelihoods[best] { i } else { best };
    let chosen = (0..likelihoods.len()).reduce(best).unwrap_or_default();
    Ok(Case {
        number,
        prompt_tokens: ids.len(),
        chosen,
        likelihoods,
        answer: question.answer,
        seconds: started.elapsed().as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_mmlus_format_is_read_with_quotes_and_lines_in_them() {
        let csv = "What is 1?,1,2,3,4,A\r\n\"Two,\nthree \"\"4\"\"?\",\"a, b\",c,d,e,B\n\n";
        let all = questions(&InputFile::new("q.csv", csv)).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(
            (all[1].question.as_str(), all[1].choices[0].as_str(), all[1].answer),
            ("Two,\nthree \"4\"?", "a, b", 1)
        );
        for (csv, message) in [
            (
                "q,a,b,c,d,A\nq,a,b,c,d,E\n",
                "q.csv, line 2: the answer `E` is not the letter of one of 4 choices",
            ),
            ("q\n", "line 1: a line needs a question, choices"),
            ("q,a,b,\n", "line 1: the answer `` is not"),
        ] {
            let error = questions(&InputFile::new("q.csv", csv)).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_prompt_is_mmlus() {
        let all = questions(&InputFile::new("q.csv", "Is it?,yes,no,B\nWas it?,no,yes,A\n")).unwrap();
        assert_eq!(
            prompt("logic", &all[..1], &all[1]),
            "The following are multiple choice questions (with answers) about logic.\n\n\
             Is it?\nA. yes\nB. no\nAnswer: B\n\nWas it?\nA. no\nB. yes\nAnswer:"
        );
    }
}
