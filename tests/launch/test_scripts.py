"""Scripts for clusters, checked by the tools of their own languages."""

import pathlib
import shutil
import subprocess
import sys

import pytest
import shell

LAUNCH = shell.ROOT / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(path):
  subprocess.run(['bash', '-n', path], check=True)
  found = shutil.which('shellcheck') or str(pathlib.Path(sys.executable).with_name('shellcheck'))
  ran = subprocess.run([found, '-x', '-P', LAUNCH, path], capture_output=True, text=True)
  assert ran.returncode == 0, ran.stdout


def _jobset() -> dict:
  yaml = pytest.importorskip('yaml')
  return yaml.safe_load((LAUNCH / 'jobset.yaml').read_text(encoding='utf-8'))


def test_the_job_inside_the_jobset_is_one_of_kubernetes():
  validate = pytest.importorskip('kubernetes_validate')
  (replicated,) = _jobset()['spec']['replicatedJobs']
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'train'}}
  validate.validate(job | replicated['template'], '1.28', strict=True)


def test_the_jobset_starts_as_many_pods_as_it_tells_them():
  spec = _jobset()['spec']
  (replicated,) = spec['replicatedJobs']
  job = replicated['template']['spec']
  (container,) = job['template']['spec']['containers']
  environment = {each['name']: each.get('value') for each in container['env']}
  name = f'dsv3-{replicated["name"]}-0-0.{spec["network"]["subdomain"]}'
  assert environment['JAX_COORDINATOR_ADDRESS'].partition(':')[0] == name
  assert job['parallelism'] == job['completions'] == int(environment['JAX_NUM_PROCESSES'])
