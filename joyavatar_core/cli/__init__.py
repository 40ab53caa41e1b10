"""The `joyavatar` command line."""
