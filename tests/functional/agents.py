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

"""The agents of the hosts that the functional tests run."""

from tests.unit.driver import fake_agent


class InMemory:
    """Agents in memory. What they do not have is a kernel."""

    real = False

    def __init__(self):
        self._agents = {}

    def setUp(self):
        pass

    def cleanUp(self):
        pass

    def client(self, host):
        return self._agents.setdefault(host, fake_agent.FakeAgent())

    def stop(self, host):
        self.client(host).down = True

    def start(self, host):
        self.client(host).down = False

    def power_off_inside(self, host, uuid):
        self.client(host).guest_powers_off(uuid)

    def imports(self, host):
        """How many images were unpacked."""
        return self.client(host).imports

    def leftovers(self, host):
        """Everything there is of any container."""
        agent = self.client(host)
        return [*agent.containers, *agent.links]
