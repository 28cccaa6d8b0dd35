"""What is asked of the Hub, and what it answers.

repository  what a repository holds
retry       requests made again after a bad moment
errors      refusals, as one line
xet         the one place that knows the Hub client's private parts
"""
