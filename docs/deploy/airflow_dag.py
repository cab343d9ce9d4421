"""A nightly run as an Airflow task (tried with 3.3); `airflow dags test mixture` runs it here and now.

What to run comes from the environment: LENGTHWISE_CONF, in the folder LENGTHWISE_RECIPES. Storage's credentials, too.
"""

import os
import subprocess

import pendulum
from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

# a wrong conf or recipe, wrong data, a broken digest, a training that diverged: trying again does not help
FINAL = {2, 3, 5, 6}


@dag(schedule="0 2 * * *", start_date=pendulum.datetime(2026, 1, 1, tz="UTC"), catchup=False, max_active_runs=1)
def mixture():
    @task(retries=6, retry_delay=pendulum.duration(minutes=5), retry_exponential_backoff=True)
    def lengthwise() -> str:
        """Returns the run's directory. The same command goes on where an earlier try was; Airflow's SIGTERM stops it in order."""
        command = ["lengthwise", "run", os.environ["LENGTHWISE_CONF"]]
        program = subprocess.Popen(command, cwd=os.environ["LENGTHWISE_RECIPES"], stdout=subprocess.PIPE, text=True)
        try:
            out, _ = program.communicate()
        except BaseException:
            # a training ends its step, and writes a checkpoint
            program.terminate()
            try:
                program.wait(timeout=1800)
            finally:
                program.kill()
            raise
        if program.returncode in FINAL:
            raise AirflowFailException(f"{' '.join(command)}: exit {program.returncode}")
        if program.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {program.returncode}, which another try may mend")
        return out.splitlines()[-1]

    lengthwise()


mixture()
