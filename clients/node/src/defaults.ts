// Defaults shared by every client; a test compares them with clients/defaults.json.

export const BUDGET_MS = 2000;
export const ATTEMPT_TIMEOUT_MS = 1000;
export const FIRST_BACKOFF_MS = 50;
export const BACKOFF_MULTIPLIER = 2;
export const LONGEST_BACKOFF_MS = 1000;
