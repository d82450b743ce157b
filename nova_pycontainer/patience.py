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

"""An agent that is away for a moment."""

import time

from nova_pycontainer.runtime import errors

#: Seconds that an agent may take to come back, and look at all that it has.
_BACK_S = 60.0
_RETRY_S = 1.0


def call(method, *arguments):
    """Have a method of the agent's client called when the agent is there.

    What it had begun for a container it has finished or undone by then.

    :raises AgentUnavailable: it does not come back in time
    """
    deadline = time.monotonic() + _BACK_S
    while True:
        try:
            return method(*arguments)
        except errors.AgentUnavailable:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)
