"""The compared methods, one class each; no experiment knows any of them by name, only its file in conf/method/."""
