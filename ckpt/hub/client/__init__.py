"""The requests to the Hub, and its answers.

repository  what a repository holds
retry       requests made again after a bad moment
errors      refusals, as one line
xet         the one place that knows the Hub client's private parts
"""
