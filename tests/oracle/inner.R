# Generalised mixed models with fixed effects in the inner problem: glmmTMB's REML = TRUE, lme4's nAGQ = 0.
# Run in the repository's root: Rscript tests/oracle/inner.R. Writes tests/oracle/inner.json; models and tables are those
# of tests/oracle/glmm_*.json.
suppressMessages({library(lme4); library(glmmTMB); library(jsonlite)})
options(digits = 15)
restricted <- c("cbpp", "cbpp_cloglog", "grouseticks", "grouseticks_brood", "bacteria", "owls_slopes", "epil_nbinom2",
  "salamanders_nbinom2", "sleepstudy_gamma_slopes", "gasoline_beta")
inner <- c("cbpp", "cbpp_probit", "cbpp_cloglog", "grouseticks", "bacteria", "owls_slopes", "singular_zero",
  "singular_correlation")

model <- function(id) {
  stored <- fromJSON(file.path("tests/oracle", paste0("glmm_", id, ".json")), simplifyVector = FALSE)
  path <- file.path(c("tests/data", "mixjax/datasets"), paste0(stored$data, ".csv"))
  d <- read.csv(path[file.exists(path)][1])
  for (f in names(stored$factor_levels)) {
    levels <- unlist(stored$factor_levels[[f]])
    d[[f]] <- if (length(levels)) factor(d[[f]], levels) else factor(d[[f]])
  }
  for (f in names(stored$fits$nAGQ1$ranef)) d[[f]] <- factor(d[[f]])
  list(formula = as.formula(stored$formula), data = d, family = stored$family, link = stored$link)
}
family_of <- function(m) switch(m$family,
  binomial = binomial(m$link), poisson = poisson(m$link), Gamma = Gamma(m$link),
  nbinom2 = nbinom2(m$link), beta = beta_family(m$link))
matrix_of <- function(M) unname(apply(as.matrix(M), 1, as.numeric, simplify = FALSE))

reml <- lapply(setNames(nm = restricted), function(id) {
  m <- model(id)
  fit <- glmmTMB(m$formula, m$data, family_of(m), REML = TRUE, control = glmmTMBControl(
    optCtrl = list(iter.max = 1e4, eval.max = 1e4, rel.tol = 1e-13, x.tol = 1e-10)))
  covariances <- VarCorr(fit)$cond
  list(m2logLik = -2 * as.numeric(logLik(fit)), df = attr(logLik(fit), "df"), beta = unname(fixef(fit)$cond),
    vcov = matrix_of(vcov(fit)$cond), Sigma = lapply(covariances, function(S) matrix_of(S[, , drop = FALSE])),
    sigma = sigma(fit), m2logLik_ML = -2 * as.numeric(logLik(update(fit, REML = FALSE))))
})
nagq0 <- lapply(setNames(nm = inner), function(id) {
  m <- model(id)
  control <- glmerControl(optimizer = "bobyqa", tolPwrss = 1e-13, calc.derivs = FALSE,
    optCtrl = list(maxfun = 1e5, rhoend = 1e-10))
  fit <- suppressMessages(glmer(m$formula, m$data, family_of(m), nAGQ = 0, control = control))
  list(m2logLik = -2 * as.numeric(logLik(fit)), beta = unname(fixef(fit)),
    vcov = matrix_of(vcov(fit, use.hessian = FALSE)),
    Sigma = lapply(VarCorr(fit), function(S) matrix_of(S[, , drop = FALSE])), isSingular = isSingular(fit))
})
versions <- sapply(c("lme4", "glmmTMB", "TMB"), function(p) as.character(packageVersion(p)))
out <- list(versions = c(R = R.version.string, as.list(versions)), reml = reml, nagq0 = nagq0)
writeLines(toJSON(out, digits = NA, auto_unbox = TRUE, na = "null"), "tests/oracle/inner.json")
