//! `lengthwise sql`

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::json::LineDelimitedWriter;
use arrow::util::display::FormatOptions;
use arrow::util::pretty::pretty_format_batches_with_options;
use clap::Args;
use futures::TryStreamExt;

use super::{ConfArguments, out, print};
use crate::dataflow::Flow;
use crate::run::{Goal, Run};
use crate::sql::engine::query;
use crate::sql::recipe::plan_query;
use crate::stage::Stage;
use crate::tables::{SEEN, Seen};
use crate::{Error, Result};

/// What the command does, for help.
pub fn about() -> String {
    format!("Ask the tables of a conf's stages: {}", SEEN.map(|seen| seen.name).join(", "))
}

#[derive(Args)]
pub struct SqlArguments {
    #[command(flatten)]
    conf: ConfArguments,
    /// One SELECT over the tables of the conf's stages
    // a file's SQL may begin with a comment, `-- …`
    #[arg(allow_hyphen_values = true)]
    query: String,
    /// Print a JSON object a row
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: SqlArguments) -> Result<()> {
    let run = arguments.conf.open(Goal::Look)?;
    let mut flow = Flow::default();
    // tables of stages that are not there are not registered; a query that needs one says which
    let absent = match flow.go(&run, None).await {
        Ok(()) => None,
        Err(Error::Absent { stage, .. }) => Some(stage),
        Err(other) => return Err(other),
    };
    let session = run.engine.session();
    register(&run, &flow, &session).await?;
    let plan = plan_query("the query", &arguments.query, &session).await;
    let plan = plan.map_err(|error| match (error, absent) {
        (Error::Written(mut wrong), Some(stage)) => {
            let computes = format!("`lengthwise run {}`", arguments.conf.conf);
            let absent = format!("stage {stage} and those after it have not been computed: {computes}");
            wrong.help = Some(wrong.help.into_iter().chain([absent]).collect::<Vec<_>>().join("; "));
            Error::Written(wrong)
        }
        (error, _) => error,
    })?;
    let no_rows = RecordBatch::new_empty(Arc::new(plan.schema().as_arrow().clone()));
    let doing = "cannot run the query";
    let frame = session.execute_logical_plan(plan).await.map_err(|e| query(doing, e))?;
    let failed = |e: arrow::error::ArrowError| query("cannot print the rows", e.into());
    if arguments.json {
        let mut rows = frame.execute_stream().await.map_err(|e| query(doing, e))?;
        while let Some(batch) = rows.try_next().await.map_err(|e| query(doing, e))? {
            let mut lines = LineDelimitedWriter::new(vec![]);
            lines.write(&batch).and_then(|()| lines.finish()).map_err(failed)?;
            if !out(lines.into_inner())? {
                break;
            }
        }
        return Ok(());
    }
    let mut rows = frame.collect().await.map_err(|e| query(doing, e))?;
    if rows.is_empty() {
        rows.push(no_rows);
    }
    let options = FormatOptions::default().with_display_error(true);
    let table = pretty_format_batches_with_options(&rows, &options).map_err(failed)?;
    print(false, &(), || table.to_string())
}

async fn register(run: &Run, flow: &Flow, session: &datafusion::prelude::SessionContext) -> Result<()> {
    for Seen { name, stage, table, schema, .. } in SEEN {
        let published = match stage {
            Stage::Tokens => {
                if let Some(tokens) = &flow.tokens {
                    tokens.register(run, session, name).await?;
                }
                continue;
            }
            Stage::Catalog => flow.catalog.as_ref(),
            Stage::Domains => flow.domains.as_ref().map(|(domains, _)| domains),
            Stage::Mixture => flow.mixture.as_ref(),
            Stage::Draw => flow.drawn.as_ref(),
            Stage::Pack => flow.packed.as_ref(),
            _ => None,
        };
        if let Some(published) = published {
            let files = [(&published.folder, &published.table(table))];
            run.engine.register(session, name, schema(), &files, &[]).await?;
        }
    }
    Ok(())
}
