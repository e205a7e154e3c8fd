"""The compared methods, one class each, configured by its file in conf/method/."""
