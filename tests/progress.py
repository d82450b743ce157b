# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What the agent of a host in the test cloud knows of a migration."""

import json
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_ASK = '''
import json, sys
from nova_pycontainer.agent import client
agent = client.Client('/run/pycontainer/agent.sock')
print(json.dumps(agent.migration_status(sys.argv[1])))
'''


def of(host, migration):
    """The progress, as the agent's verb ``migration_status`` gives it."""
    done = subprocess.run(
        [str(_ROOT / 'tools/cloud.sh'), 'run', host, 'env',
         f'PYTHONPATH={_ROOT}', sys.executable, '-c', _ASK, migration],
        check=True, text=True, stdout=subprocess.PIPE, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])
