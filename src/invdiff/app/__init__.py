"""The web page: draw with and without guidance, look through an audit, compare results. Needs the `ui` extra."""
