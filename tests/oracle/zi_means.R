# Marginal means of zero-inflated models: glmmTMB's emmeans of the conditional part, predictions of the response with
# their errors, and regrid() of the first. Run in the repository's root: Rscript tests/oracle/zi_means.R.
# Writes tests/oracle/zi_means.json.
suppressMessages({library(glmmTMB); library(emmeans); library(jsonlite)})
sal <- read.csv("tests/data/Salamanders.csv", stringsAsFactors = TRUE)
sal$mined <- factor(sal$mined, c("yes", "no"))
sal$site <- factor(sal$site)
control <- glmmTMBControl(optCtrl = list(iter.max = 1e4, eval.max = 1e4, rel.tol = 1e-15, x.tol = 0))
table_of <- function(x) as.list(as.data.frame(x))
cells <- expand.grid(mined = levels(sal$mined), spp = levels(sal$spp), site = NA)
out <- lapply(list(zip = poisson(), zinb = nbinom2()), function(family) {
  fit <- glmmTMB(count ~ mined + (1 | site), sal, family, ziformula = ~mined, control = control)
  e <- emmeans(fit, ~mined, component = "cond", type = "response")
  new <- data.frame(mined = levels(sal$mined), site = NA)
  r <- predict(fit, new, type = "response", se.fit = TRUE, re.form = NA)
  list(m2logLik = -2 * as.numeric(logLik(fit)), cond = table_of(confint(e)), cond_se = summary(e)$SE,
       ratio = table_of(confint(pairs(e))), ratio_test = table_of(pairs(e)),
       difference = table_of(confint(pairs(regrid(e)))),
       response = list(estimate = as.vector(r$fit), std_error = as.vector(r$se.fit)))
})
fit <- glmmTMB(count ~ mined + (1 | site), sal, poisson, ziformula = ~spp, control = control)
r <- predict(fit, cells, type = "response", re.form = NA)
out$averaged <- list(mined = as.character(cells$mined), spp = as.character(cells$spp), response = as.vector(r))
write_json(out, "tests/oracle/zi_means.json", digits = 15, auto_unbox = TRUE, na = "null")
