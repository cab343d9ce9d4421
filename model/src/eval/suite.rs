//! An evaluation as a list of cases: their names, how they are asked, and their summary.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::conf::{BookqaConf, ChoicesConf, Evaluation, NeedleConf, RetrievalConf};
use super::loss::{self, Document};
use super::retrieval::Task;
use super::{EvalModel, InputFile, TextTokenizer, bookqa, choices, needle, retrieval};
use crate::{Error, Result};

/// The questions of an evaluation. The loss evaluation has documents instead, and no suite.
pub enum Suite<'a> {
    /// Cases are lengths and depths.
    Needle(needle::Haystack<'a>, Vec<(usize, f64)>),
    /// Cases are lengths, tasks and samples.
    Retrieval(retrieval::TaskGenerator<'a>, Vec<(usize, Task, usize)>),
    Bookqa(Vec<(usize, bookqa::Question)>, &'a TextTokenizer, &'a BookqaConf),
    Choices(Vec<choices::Question>, Vec<choices::Question>, &'a TextTokenizer, &'a ChoicesConf),
}

impl<'a> Suite<'a> {
    /// `files` are the files of each of [`Evaluation::urls`].
    ///
    /// # Errors
    /// A setting is impossible, or a question is malformed; the error then names its file and line.
    pub fn new(
        evaluation: &'a Evaluation,
        text: &'a TextTokenizer,
        files: &[Vec<InputFile>],
    ) -> Result<Self> {
        // Essays are concatenated.
        let essays = || files[0].iter().map(|file| file.text.as_str()).collect::<String>();
        let suite = match evaluation {
            Evaluation::Loss => return Err(Error::Conf("the loss evaluation has no questions".into())),
            Evaluation::Needle(conf) => {
                Suite::Needle(needle::Haystack::new(conf, text, &essays())?, needles(conf))
            }
            Evaluation::Retrieval(conf) => {
                let made = retrieval::TaskGenerator::new(text, &essays(), conf.seed)?;
                // If the shortest length has room for each task, all have.
                if let Some(least) = conf.lengths.iter().min() {
                    conf.tasks
                        .iter()
                        .try_for_each(|task| made.shortest_question(*task, *least, 0).map(drop))?;
                }
                Suite::Retrieval(made, tasks(conf))
            }
            Evaluation::Bookqa(conf) => Suite::Bookqa(all(&files[0], bookqa::questions)?, text, conf),
            Evaluation::Choices(conf) => {
                let mut examples = files.get(1).map_or(Ok(vec![]), |files| all(files, choices::questions))?;
                examples.truncate(conf.shots);
                Suite::Choices(all(&files[0], choices::questions)?, examples, text, conf)
            }
        };
        if suite.cases().is_empty() {
            let names: Vec<&str> = files[0].iter().map(|file| file.name.as_str()).collect();
            return Err(Error::Conf(format!("{} has no question", names.join(", "))));
        }
        Ok(suite)
    }

    /// The names of its cases.
    pub fn cases(&self) -> Vec<String> {
        match self {
            Suite::Needle(_, needles) => {
                needles.iter().map(|(length, depth)| format!("length-{length}-depth-{depth}")).collect()
            }
            Suite::Retrieval(_, tasks) => {
                let name = |(length, task, sample): &(usize, Task, usize)| {
                    format!("length-{length}-{}-{sample}", task.name())
                };
                tasks.iter().map(name).collect()
            }
            Suite::Bookqa(questions, ..) => numbered(questions.len()),
            Suite::Choices(questions, ..) => numbered(questions.len()),
        }
    }

    /// Asks a case, by its index among [`cases`](Self::cases).
    pub fn ask(&self, subject: &EvalModel, case: usize) -> Result<Value> {
        Ok(match self {
            Suite::Needle(haystack, needles) => {
                let (length, depth) = needles[case];
                json!(haystack.ask(subject, length, depth)?)
            }
            Suite::Retrieval(retrieval, tasks) => {
                let (length, task, sample) = tasks[case];
                json!(retrieval.ask(subject, task, length, sample)?)
            }
            Suite::Bookqa(questions, text, conf) => {
                let (line, question) = &questions[case];
                json!(bookqa::ask(subject, text, *line, question, conf.length)?)
            }
            Suite::Choices(questions, examples, text, conf) => {
                let question = &questions[case];
                json!(choices::ask(subject, text, &conf.subject, examples, case + 1, question)?)
            }
        })
    }
}

fn numbered(questions: usize) -> Vec<String> {
    (1..=questions).map(|i| format!("question-{i}")).collect()
}

/// The questions of several files.
fn all<T>(files: &[InputFile], questions: fn(&InputFile) -> Result<Vec<T>>) -> Result<Vec<T>> {
    Ok(files.iter().map(questions).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn needles(conf: &NeedleConf) -> Vec<(usize, f64)> {
    let depths = |length: &usize| conf.depths.iter().map(|depth| (*length, *depth)).collect::<Vec<_>>();
    conf.lengths.iter().flat_map(depths).collect()
}

fn tasks(conf: &RetrievalConf) -> Vec<(usize, Task, usize)> {
    let mut all = vec![];
    for length in &conf.lengths {
        for task in &conf.tasks {
            all.extend((0..conf.samples).map(|sample| (*length, *task, sample)));
        }
    }
    all
}

/// The cases of some documents, without those that have nothing to predict.
pub fn loss_cases(subject: &EvalModel, documents: &[Document]) -> Result<Vec<Value>> {
    let ranges = loss::ranges();
    let mut cases = vec![];
    for document in documents {
        cases.extend(loss::document_losses(subject, document, &ranges)?.map(|case| json!(case)));
    }
    Ok(cases)
}

/// The summary of an evaluation's cases.
///
/// # Errors
/// They are not cases of this evaluation.
pub fn summary(evaluation: &Evaluation, cases: &[Value]) -> Result<Value> {
    fn all<T: DeserializeOwned>(cases: &[Value]) -> Result<Vec<T>> {
        let cases = cases.iter().map(|case| serde_json::from_value(case.clone()));
        cases.collect::<Result<_, _>>().map_err(|e| Error::Conf(format!("a case of an evaluation: {e}")))
    }
    let mean = |scores: Vec<f64>| scores.iter().sum::<f64>() / scores.len().max(1) as f64;
    Ok(match evaluation {
        Evaluation::Needle(_) => {
            let cases: Vec<needle::Case> = all(cases)?;
            json!({
                "score": mean(cases.iter().map(|case| case.score).collect()),
                "prompt_tokens": cases.iter().map(|case| case.prompt_tokens).sum::<usize>(),
                "reused_tokens": cases.iter().map(|case| case.reused).sum::<usize>(),
                "cells": cases.iter().map(|case| json!({
                    "length": case.length, "depth": case.depth, "score": case.score,
                })).collect::<Vec<_>>(),
            })
        }
        Evaluation::Loss => {
            let cases: Vec<loss::Case> = all(cases)?;
            let ranges = loss::ranges();
            json!({ "documents": cases.len(), "ranges": ranges, "cells": loss::table(&cases, &ranges) })
        }
        Evaluation::Retrieval(conf) => {
            let cases: Vec<retrieval::Case> = all(cases)?;
            let mut cells = vec![];
            for length in &conf.lengths {
                for task in &conf.tasks {
                    let own = cases.iter().filter(|case| case.length == *length && case.task == *task);
                    let scores: Vec<f64> = own.map(|case| case.score).collect();
                    cells.push(json!({
                        "length": length, "task": task, "samples": scores.len(), "score": mean(scores),
                    }));
                }
            }
            json!({ "score": mean(cases.iter().map(|case| case.score).collect()), "cells": cells })
        }
        Evaluation::Bookqa(_) => {
            let cases: Vec<bookqa::Case> = all(cases)?;
            json!({
                "questions": cases.len(),
                "f1": mean(cases.iter().map(|case| case.f1).collect()),
                "cut": cases.iter().filter(|case| case.cut > 0).count(),
            })
        }
        Evaluation::Choices(_) => {
            let cases: Vec<choices::Case> = all(cases)?;
            let right = cases.iter().filter(|case| case.chosen == case.answer).count();
            let accuracy = right as f64 / cases.len().max(1) as f64;
            json!({
                "questions": cases.len(),
                "right": right,
                "accuracy": accuracy,
                "error": (accuracy * (1.0 - accuracy) / cases.len().max(1) as f64).sqrt(),
            })
        }
    })
}
