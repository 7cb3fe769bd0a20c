"""The speedrun: tasks fixed by hashes, records as folders that one command verifies, and their leaderboard."""
