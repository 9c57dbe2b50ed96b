"""The library's logger: what surgery changed, what it left and why; warnings a user should read. Silent until configured."""

import logging

logger = logging.getLogger("batchnorm")
