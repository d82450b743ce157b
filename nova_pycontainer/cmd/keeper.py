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

"""pycontainer-keeper: start the keeper in the foreground, for an init system.

Without one the agent starts it by itself.
"""

import os
import typing as ty

from oslo_config import cfg

from nova_pycontainer.agent import options
from nova_pycontainer.runtime import keeper_client


def main(argv: list[str] | None = None) -> ty.NoReturn:
    conf = cfg.ConfigOpts()
    options.register(conf)
    conf(argv, project='pycontainer', prog='pycontainer-keeper',
         description='Holds consoles and exit statuses of this host\'s '
                     'containers while the agent is restarted.')
    config = options.runtime_config(conf)
    config.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    command, env = keeper_client.command(config.keeper_socket)
    # In place of this process, which has loaded far more than the keeper may
    # cost.
    os.execve(command[0], command, env)


if __name__ == '__main__':
    main()
